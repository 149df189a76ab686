"""UniPC against closed forms, a few numbers of the publisher's, and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from worldr1_jax.camera.injection import Camera
from worldr1_jax.mesh import placement as sharding
from worldr1_jax.mesh.make import make_mesh
from worldr1_jax.models import umt5
from worldr1_jax.models.wan import dit as wan_dit
from worldr1_jax.models.wan import vae as wan_vae
from worldr1_jax.policies import wan
from worldr1_jax.policies.stages import Pipeline, Sampling
from worldr1_jax.rollout import schedule, unipc
from worldr1_jax.rollout.sample import Sampler, sample, sample_keys

ODE = Sampler("none")
SHAPE = (3, 2, 2, 2)
STEP = jax.jit(unipc.step)
# diffusers 0.42.1's UniPCMultistepScheduler on `toy` from `START`, 8 steps, shift 3, by order;
# tests/parity/test_unipc.py computes them again.
START = np.array([-1.5, 0.25, 2.0], np.float32)
GOLDEN = {
    1: [-0.340915, -0.006143, 0.863982],
    2: [-0.364293, -0.000186, 0.889550],
    3: [-0.365056, -0.000110, 0.890464],
}


def toy(tanh, x, timestep):
    """A velocity far from linear, in numpy or torch."""
    return tanh(1.5 * x + 0.3) + 0.4 * timestep / 1000 * x - 0.2


def run(solver, x, velocity, steps=None):
    """The plain loop: `(predicted, corrected)` states at 0 .. steps."""
    memory = unipc.start(solver, x)
    predicted, corrected = [x], []
    for i in range(len(solver.timesteps) if steps is None else steps):
        x, memory = STEP(solver, i, x, velocity(x, i), memory)
        predicted.append(x)
        corrected.append(memory.state)
    return predicted, corrected


@pytest.mark.parametrize("steps,shift", [(1, 3.0), (7, 1.0), (20, 3.0), (50, 5.0)])
def test_first_order_without_corrector_is_euler(steps, shift):
    solver = unipc.make(steps, shift, 1, corrector=False)
    x = euler = jnp.asarray(START)
    states, _ = run(solver, x, lambda x, i: toy(jnp.tanh, x, solver.timesteps[i]))
    for i in range(steps):
        v = toy(jnp.tanh, euler, solver.timesteps[i])
        euler = euler + (solver.sigmas[i + 1] - solver.sigmas[i]) * v
        np.testing.assert_allclose(states[i + 1], euler, atol=1e-5)  # float32 over 50 steps


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("order", unipc.ORDERS)
def test_exact_for_a_constant_data_prediction(order, corrector):
    """Then the path is the straight line from noise to data, whatever the order."""
    solver = unipc.make(12, 5.0, order, corrector=corrector)
    noise, data = jnp.asarray(START), jnp.asarray([0.7, -3.0, 0.1])
    first = solver.sigmas[0]
    states, _ = run(
        solver, (1 - first) * data + first * noise, lambda x, i: (x - data) / solver.sigmas[i]
    )
    for state, sigma in zip(states, solver.sigmas, strict=True):
        np.testing.assert_allclose(state, (1 - sigma) * data + sigma * noise, atol=1e-5)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
@pytest.mark.parametrize("order", unipc.ORDERS)
def test_exact_for_polynomials_in_log_snr(order, power):
    """Data prediction l^power at log-SNR l: a step is an integral with a closed form.

    The predictor of order 3 is exact up to power 2, the correctors of orders 2 and 3 up to their
    order, once their steps are of full order; 1e-5 of the size is float32's.
    """
    solver = unipc.make(16, 3.0, order)
    sigmas = np.asarray(solver.sigmas, np.float64)
    log_snr = np.log((1 - sigmas[:-1]) / sigmas[:-1])
    predicted, corrected = run(
        solver, jnp.ones(1), lambda x, i: (x - log_snr[i] ** power) / solver.sigmas[i]
    )
    # the antiderivative of e^l l^power
    terms = np.polynomial.Polynomial([0] * power + [1])
    whole = sum((-1) ** k * (terms.deriv(k) if k else terms) for k in range(power + 1))

    def exact(i):
        (a, b), ratio = log_snr[i : i + 2], sigmas[i + 1] / sigmas[i]
        return ratio * corrected[i] + sigmas[i + 1] * (np.exp(b) * whole(b) - np.exp(a) * whole(a))

    for i in range(order - 1, 16 - order):
        scale = 1e-5 * (1 + np.abs(log_snr).max() ** power)
        if order == 3 and power <= 2:
            np.testing.assert_allclose(predicted[i + 1], exact(i), atol=scale)
        if power == 0 or (order > 1 and power <= order):
            np.testing.assert_allclose(corrected[i + 1], exact(i), atol=scale)


def gaussian(sigma, z, mean=0.5, std=0.4):
    """State at `sigma` of the flow whose data are normal, and its velocity there."""
    spread = np.hypot((1 - sigma) * std, sigma)
    x = (1 - sigma) * mean + spread * z
    return (
        x,
        lambda x: (x - mean - (1 - sigma) * (std / spread) ** 2 * (x - (1 - sigma) * mean)) / sigma,
    )


def gaussian_error(order, corrector, steps):
    """Largest error at log-SNR 3 of `steps` even steps from -3."""
    # further steps are on the schedule and are not taken, so that the order stays full
    log_snr = -3 + 6 / steps * np.arange(steps + order)
    sigmas = 1 / (1 + np.exp(log_snr))
    solver = unipc.tables(sigmas, 1000 * sigmas[:-1], order, corrector=corrector)
    z = np.linspace(-2, 2, 9)
    x = jnp.asarray(gaussian(sigmas[0], z)[0], jnp.float32)
    states, _ = run(solver, x, lambda x, i: gaussian(sigmas[i], z)[1](x), steps)
    return np.abs(states[-1] - gaussian(sigmas[steps], z)[0]).max()


def test_convergence_order_rises_with_the_order():
    """Halving the step divides the error by 2^p: p is the order, and one more with the corrector.
    The start of order 1 holds order 3 with its corrector back, so it has no upper bound here."""
    for corrector, lowest in ((False, (0.9, 1.7, 2.7)), (True, (1.9, 2.8, 3.2))):
        errors = [[gaussian_error(k, corrector, n) for n in (16, 32)] for k in unipc.ORDERS]
        rates = [np.log2(coarse / fine) for coarse, fine in errors]
        assert (np.array(rates) > lowest).all(), rates
        assert errors[0][1] > 2 * errors[1][1] > 4 * errors[2][1], errors


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_golden(order):
    solver = unipc.make(8, 3.0, order)
    states, _ = run(solver, jnp.asarray(START), lambda x, i: toy(jnp.tanh, x, solver.timesteps[i]))
    np.testing.assert_allclose(states[-1], GOLDEN[order], atol=1e-5)  # float32 over 8 steps


def test_orders_fall_at_both_ends():
    solver = unipc.make(5, 3.0, 3)
    np.testing.assert_array_equal((solver.predictor != 0).sum(1), [1, 2, 3, 2, 1])
    np.testing.assert_array_equal((solver.corrector != 0).sum(1), [1, 2, 3, 4, 3])
    assert solver.advance[0] == 0 and solver.advance[-1] == 1  # the result is the last prediction
    for weights in (solver.predictor, solver.corrector):
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


# -- in the sampler


def velocity(latents, timestep, text):
    """Each sample by itself, smooth, and dependent on all three arguments."""
    shift = jnp.mean(text, axis=(1, 2))[:, None, None, None, None]
    return jnp.tanh(1.4 * latents + shift) + 0.3 * timestep[:, None, None, None, None] / 1000


@pytest.fixture(scope="module")
def inputs():
    noise = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    text = jax.random.normal(jax.random.key(2), (4, 5, 3))
    return sample_keys(jax.random.key(0), 4), noise, text


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_sample_is_the_plain_loop(inputs, order):
    keys, noise, text = inputs
    solver, null = unipc.make(6, 3.0, order), jnp.ones((5, 3))
    got = jax.jit(
        lambda solver: sample(
            velocity, keys, noise, solver, text, null, sampler=Sampler("none", guidance=3.0)
        )
    )(solver)

    def guided(x, i):
        time = jnp.full(4, solver.timesteps[i])
        return 3 * velocity(x, time, text) - 2 * velocity(x, time, jnp.ones_like(text))

    states, _ = run(solver, noise, guided)
    np.testing.assert_allclose(got.latents, states[-1], atol=1e-5)
    np.testing.assert_array_equal(got.window_latents, noise[None])
    assert got.log_prob_old.shape == (0, 4) and got.window_start == 0


def test_many_steps_meet_euler(inputs):
    """Both solve one ODE; what is left is Euler's error, which goes as 1 / steps."""
    keys, noise, text = inputs

    def untimed(latents, timestep, text):  # a model that heard the timesteps would hear two series
        return velocity(latents, 0 * timestep, text)

    def final(schedule):
        out = jax.jit(lambda: sample(untimed, keys, noise, schedule, text, sampler=ODE))()
        return np.asarray(out.latents)

    euler = final(schedule.sigmas(2000, 3.0))
    assert np.abs(final(unipc.make(200, 3.0)) - euler).max() < 1e-3 * euler.std()


def test_refusals(inputs):
    keys, noise, text = inputs
    solver = unipc.make(6, 3.0)
    for sampler, window in [
        (Sampler("flow"), (0, 2)),
        (Sampler("cps", 0.5), (1, 1)),
        (ODE, (0, 1)),
    ]:
        with pytest.raises(ValueError, match="UniPC is deterministic"):
            sample(velocity, keys, noise, solver, text, sampler=sampler, window=window)
    with pytest.raises(ValueError, match="UniPC is deterministic"):
        sample(velocity, keys, noise, solver, text, sampler=Sampler("flow"))
    with pytest.raises(ValueError, match="on_step"):
        sample(velocity, keys, noise, solver, text, sampler=ODE, on_step=lambda x, i: x)
    for order in (0, 4):
        with pytest.raises(ValueError, match="order"):
            unipc.make(6, 3.0, order)
    for steps, shift in [(0, 3.0), (6, 0.0)]:
        with pytest.raises(ValueError):
            unipc.make(steps, shift)
    for sigmas in [(1.0, 0.5, 0.0), (0.9, 0.9, 0.0), (0.9, 0.5, -0.1)]:
        with pytest.raises(ValueError, match="sigmas"):
            unipc.tables(np.array(sigmas), np.array([900.0, 500.0]))


# -- in the pipeline


@pytest.fixture(scope="module")
def model():
    """A DiT of one block over two devices; VAE and text encoder are shapes only."""
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    config = wan_dit.Config(
        num_attention_heads=1, attention_head_dim=8, text_dim=3, freq_dim=8, ffn_dim=8, num_layers=1
    )
    dit = wan_dit.WanDiT(config, nnx.Rngs(0))
    # a fresh head is zero, and so is its velocity
    head = dit.proj_out.kernel
    head[...] = 0.3 * jax.random.normal(jax.random.key(4), head.shape)
    vae = nnx.eval_shape(lambda: wan_vae.WanVAE(wan_vae.Config(), nnx.Rngs(0)))
    text = nnx.eval_shape(lambda: umt5.UMT5Encoder(umt5.Config.nano(), nnx.Rngs(0)))
    dit = sharding.place(dit, wan_dit.PLACES, mesh)
    return wan.Wan({wan.POLICY: dit, wan.VAE: vae, wan.TEXT: text}, None, 5), mesh


PROMPTS = ["A red sphere.", "Pan left. A blue box."]


def test_pipeline_runs_the_solver_on_the_given_noise(model):
    """Euler stays what it is without the arguments; noise takes the place of what keys draw."""
    pipeline = Pipeline(*model, size=(5, 32, 16), sampling=Sampling(3, 3.0), camera=Camera("none"))
    rng = np.random.default_rng(0)
    noise, text = (rng.standard_normal((2, *shape)) for shape in (pipeline.latent_shape, (5, 3)))
    text = jnp.asarray(text, jnp.float32)
    rest = (text, pipeline.paths(PROMPTS), sample_keys(jax.random.key(3), 2))

    def rollout(sampler=ODE, **options):
        return pipeline.rollout(pipeline.adapters, *rest, sampler=sampler, **options)

    drawn = rollout()
    again = rollout(noise=np.asarray(drawn.window_latents[0]))
    np.testing.assert_allclose(again.latents, drawn.latents, atol=1e-6)

    solver = unipc.make(4, 5.0, 3)
    got = rollout(solver=solver, noise=noise)
    jitted = jax.jit(pipeline.velocity)
    states, _ = run(
        solver, jnp.asarray(noise, jnp.float32),
        lambda x, i: jitted(
            pipeline.adapters, pipeline.base, x, jnp.full(2, solver.timesteps[i]), text
        ),
    )  # fmt: skip
    np.testing.assert_allclose(got.latents, states[-1], atol=1e-5)
    assert np.abs(got.latents - noise).max() > 0.1
    with pytest.raises(ValueError, match="noise is"):
        rollout(noise=noise[:1])
    with pytest.raises(ValueError, match="UniPC is deterministic"):
        rollout(Sampler("flow"), width=1, solver=solver)


def test_pipeline_refuses_the_solver_with_a_camera_in_its_steps(model):
    pipeline = Pipeline(*model, size=(5, 32, 16), sampling=Sampling(3, 3.0), camera=Camera("step"))
    with pytest.raises(ValueError, match="on_step"):
        pipeline.rollout(
            pipeline.adapters, jnp.zeros((2, 5, 3)), pipeline.paths(PROMPTS),
            sample_keys(jax.random.key(3), 2), sampler=ODE, solver=unipc.make(4, 3.0),
        )  # fmt: skip


def test_a_still_camera_puts_nothing_into_the_steps(model):
    """Its warp is noise of its own, which has nothing to do with a movement."""
    found = {}
    for mode in ("step", "none"):
        pipeline = Pipeline(
            *model, size=(5, 32, 16), sampling=Sampling(3, 3.0), camera=Camera(mode)
        )
        prompts = ["Camera fixed. A box.", "Camera pan left. A box."]
        found[mode] = pipeline.rollout(
            pipeline.adapters, jnp.zeros((2, 5, 3)), pipeline.paths(prompts),
            sample_keys(jax.random.key(3), 2), sampler=ODE,
        ).latents  # fmt: skip
    still, moving = np.abs(found["step"] - found["none"]).max((1, 2, 3, 4))
    assert still < 1e-5 and moving > 0.01  # two programs, whose rounding may differ
