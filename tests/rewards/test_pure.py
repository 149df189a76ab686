"""A reward inside a user's own program: jitted, differentiated, batched, on a mesh with axes of the
user's own; and rewards of the user's own beside ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from worldr1_jax.camera import commands, trajectory
from worldr1_jax.rewards import Reward, build

FRAMES, SIDE = 5, 32
PROMPTS = ["Camera push in. A red sphere.", "Camera pan left. A green box.", "A view.", "A wall."]
WEIGHTS = {"recon": 1.0, "trajectory": 1.0, "general": 0.5}


@pytest.fixture(scope="module")
def options(weights):
    """Of `build`, on random weights of a few thousand parameters."""
    return {
        "recon": {"likeness": "ssim", "views": 2},
        "reconstruct": {"da3": str(weights / "da3")},
    }


@pytest.fixture(scope="module")
def scorer(options):
    """Beside ours a judge on the host, which no program holds."""
    return build(WEIGHTS | {pleased: 1.0}, general="palette", **options)


def pleased(videos, prompts, camtoworld):
    """A judge that answers alike whatever it is shown."""
    return np.ones(len(prompts))


OFF = ("pleased",)


@pytest.fixture(scope="module")
def given():
    """Videos, each of which shows something in every frame, and the paths asked for."""
    rng = np.random.default_rng(0)
    coarse = rng.random((len(PROMPTS), FRAMES, 8, 8, 3))
    videos = np.kron(coarse, np.ones((1, 1, 4, 4, 1))).astype(np.float32)
    paths = [trajectory.path(commands.moves(prompt), FRAMES) for prompt in PROMPTS]
    return jnp.asarray(videos), jnp.asarray(np.stack(paths), jnp.float32)


@pytest.fixture(scope="module")
def wanted(scorer, given):
    """What the convenience object says."""
    videos, paths = given
    scores = scorer(videos, PROMPTS, np.asarray(paths), off=OFF)
    assert scores.valid.all()
    return scores


def assert_same(got, want, some=slice(None)):
    assert got.parts.keys() == want.parts.keys()
    for name, part in want.parts.items():
        np.testing.assert_allclose(got.parts[name], part[some], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got.total, want.total[some], rtol=1e-4)


@pytest.mark.slow
def test_it_is_one_function_with_a_gradient(scorer, given, wanted):
    """Of the networks, the videos, the cameras and what is asked: all of them traced."""

    @jax.jit
    def program(networks, videos, paths, asked):
        def loss(videos):
            scores = scorer.score(networks, videos, paths, asked, OFF)
            return -scores.total.sum(), scores

        (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(videos)
        return scores, gradient

    scores, gradient = program(scorer.networks, *given, scorer.ask(PROMPTS))
    assert_same(scores, wanted)
    assert gradient.shape == given[0].shape and np.isfinite(gradient).all()
    assert (np.abs(gradient).max((1, 2, 3, 4)) > 0).all()


def test_it_is_batched(scorer, given, wanted):
    """Without S_recon, whose loops over tiles a batch would only nest deeper."""
    off = ("recon", *OFF)

    def one(video, path, asked):
        lone = jax.tree.map(lambda leaf: leaf[None], (video, path, asked))
        return jax.tree.map(lambda leaf: leaf[0], scorer.score(scorer.networks, *lone, off=off))

    scores = jax.jit(jax.vmap(one))(*given, scorer.ask(PROMPTS))
    for name in scores.parts:
        np.testing.assert_allclose(scores.parts[name], wanted.parts[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_runs_on_a_mesh_of_the_users_own(options, given, wanted):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=auto, devices=jax.devices()[:4])
    scorer = build(WEIGHTS, general="palette", mesh=mesh, **options)
    place = NamedSharding(mesh, P("x"))
    some = [1, 2]
    arrays = (*(array[jnp.array(some)] for array in given), scorer.ask([PROMPTS[i] for i in some]))
    with jax.set_mesh(mesh):
        scores = jax.jit(scorer.score)(scorer.networks, *jax.device_put(arrays, place))
    assert_same(scores, wanted, jnp.array(some))


# -- rewards of the user's own


def calm(videos, prompts, camtoworld):
    """Any judge, in numpy: 1 for a video that stands still."""
    assert isinstance(videos, np.ndarray) and len(prompts) == len(videos) == len(camtoworld)
    return 1 - np.abs(np.diff(videos, axis=1)).mean((1, 2, 3, 4))


@dataclasses.dataclass(frozen=True)
class Brightness(Reward):
    """The docstring's example."""

    least: float = 0.2

    def score(self, networks, evidence, asked):
        mean = evidence.videos.mean((1, 2, 3, 4))
        return {"brightness": jnp.minimum(mean / self.least, 1.0)}


def test_a_plain_function_and_an_object_are_rewards(given):
    videos, paths = given
    scorer = build({Brightness(least=1.0): 1.0, calm: 0.5, "general": 2.0}, general="palette")
    scores = scorer(videos, PROMPTS, np.asarray(paths))
    bright = videos.mean((1, 2, 3, 4))
    want = calm(np.asarray(videos), PROMPTS, paths)
    np.testing.assert_allclose(scores.parts["brightness"], bright, rtol=1e-5)
    np.testing.assert_allclose(scores.parts["calm"], want, rtol=1e-5)
    total = bright + 0.5 * want + 2 * scores.parts["general"]
    np.testing.assert_allclose(scores.total, total, rtol=1e-5)
    # What runs on the host is in no program, unless it is turned off.
    with pytest.raises(ValueError, match="the reward calm is a plain function") as error:
        scorer.score(scorer.networks, *given, scorer.ask(PROMPTS))
    assert "\n" not in str(error.value)
    alone = scorer.score(scorer.networks, *given, scorer.ask(PROMPTS), off=("calm",))
    np.testing.assert_allclose(alone.total, total - 0.5 * want, rtol=1e-5)


def test_a_function_that_answers_badly_is_named(given):
    videos, paths = given
    scorer = build({calm: 1.0, (lambda *_: np.zeros(3)): 1.0})
    with pytest.raises(ValueError, match=r"<lambda> gave numbers of the shape \(3,\) for 4 videos"):
        scorer(videos, PROMPTS, np.asarray(paths))


# -- videos that are no videos


@pytest.mark.parametrize(
    "off", [(), ("recon", "trajectory"), ("recon", "trajectory", "general"),
            ("recon", "trajectory", "pleased")],
)  # fmt: skip
def test_a_video_that_is_not_finite_wins_in_no_phase(scorer, given, off):
    """Not where all 3D rewards are off, not by a prompt that names no colour, and not by a judge
    that likes everything."""
    videos, paths = given
    broken = videos.at[2].set(jnp.nan).at[3, 1, 4, 5, 0].set(jnp.inf)
    scores = scorer(broken, PROMPTS, np.asarray(paths), off=off)
    assert scores.valid.tolist() == [True, True, False, False]
    assert np.isnan(scores.total[2:]).all() and np.isfinite(scores.total[:2]).all()
