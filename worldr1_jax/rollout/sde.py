"""One denoising step: its mean and std, and the log-probability of what was drawn.

All in float32 whatever the inputs' types. Notation: `dt = sigma_next - sigma < 0`, `D = -dt`; the
model predicts `v = eps - x0`. Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818),
coefficients-preserving sampling (arXiv 2509.05952).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

LEVELS = ("sd3", "linear", "constant")
Level = float | Float[Array, "..."]  # a sigma or a std: one number, or one a sample [B 1 ...]


class Step(NamedTuple):
    """Gaussian of one stochastic step: `x_next = mean + std * eps`.

    std is one number, or one a sample `[B 1 ...]`, as the levels are that it was made of: every
    sigma below may be either.
    """

    mean: Float[Array, "B ..."]
    std: Float[Array, "..."]


def noise_level(
    name: str, sigma: Float[Array, "..."], eta: float, sigma_clamp: Float[Array, ""]
) -> Float[Array, "..."]:
    """Diffusion coefficient `s(sigma)` of the flow-SDE.

    Args:
      name: "sd3": `eta sqrt(sigma / (1 - sigma))` (Flow-GRPO on SD3 and FLUX; eta 0.7);
        "linear": `eta sigma_clamp sigma` (Flow-GRPO on Wan, which has eta 1);
        "constant": `eta` (DanceGRPO; eta 0.3).
      sigma: level of the state before the step, in (0, 1].
      eta: scale of the noise, > 0.
      sigma_clamp: `sigmas[1]`; replaces larger sigmas where `1 - sigma` divides, so that the first
        step, at sigma 1, stays finite.

    Raises:
      ValueError: when `name` is none of the three.
    """
    if name == "sd3":
        return eta * jnp.sqrt(sigma / (1 - jnp.minimum(sigma, sigma_clamp)))
    if name == "linear":
        return eta * sigma_clamp * sigma
    if name == "constant":
        return jnp.full_like(sigma, eta)
    raise ValueError(f"noise level {name!r} is unknown; it must be one of {', '.join(LEVELS)}")


def flow_sde(
    x: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    sigma: Level,
    sigma_next: Level,
    eta: float,
    sigma_clamp: float | Float[Array, ""],
    level: str = "sd3",
) -> Step:
    """Euler-Maruyama step of the SDE that has the marginals of the flow's ODE.

    Args:
      x: state at `sigma`.
      v: velocity at `x`, like x.
      sigma: level before the step, in (0, 1].
      sigma_next: level after the step, below sigma.
      eta: scale of the noise (see `noise_level`).
      sigma_clamp: `sigmas[1]` (see `noise_level`).
      level: name of the noise-level function.
    """
    x, v, sigma, sigma_next = _float32(x, v, sigma, sigma_next)
    s = noise_level(level, sigma, eta, jnp.asarray(sigma_clamp, jnp.float32))
    dt = sigma_next - sigma
    pull = s**2 / (2 * sigma)
    mean = x * (1 + pull * dt) + v * ((1 + pull * (1 - sigma)) * dt)
    return Step(mean, s * jnp.sqrt(-dt))


def cps(
    x: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    sigma: Level,
    sigma_next: Level,
    eta: float,
) -> Step:
    """Coefficients-preserving step: part of the predicted noise is replaced by fresh noise.

    The state at `sigma_next` has exactly that level's amounts of data and noise, however coarse the
    schedule. Fresh part: `s = sigma_next sin(eta pi / 2)`, eta in (0, 1]; 0 at `sigma_next = 0`.
    Arguments as in `flow_sde`.
    """
    x, v, sigma, sigma_next = _float32(x, v, sigma, sigma_next)
    data = x - sigma * v
    noise = x + (1 - sigma) * v
    kept = sigma_next * math.cos(eta * math.pi / 2)  # sqrt(sigma_next^2 - s^2)
    return Step((1 - sigma_next) * data + kept * noise, sigma_next * math.sin(eta * math.pi / 2))


def ode(
    x: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    sigma: Level,
    sigma_next: Level,
) -> Float[Array, "B ..."]:
    """Deterministic Euler step `x + v dt`, float32."""
    x, v, sigma, sigma_next = _float32(x, v, sigma, sigma_next)
    return x + v * (sigma_next - sigma)


def log_prob(
    x_next: Float[Array, "B ..."], mean: Float[Array, "B ..."], std: Level
) -> Float[Array, " B"]:
    """Log-density of `x_next`, as the mean over latent dimensions (not the sum).

    The mean makes ratios comparable between latent sizes; it is why clip ranges are 1e-3 to 1e-5.
    It is the true Gaussian density for CPS also. Departure: the CPS reference leaves out
    `1 / (2 std^2)`, so its ratio is no ratio of densities, and its clip range changes meaning from
    step to step.
    """
    x_next, mean, std = _float32(x_next, mean, std)
    square, std = _mean_over_latent((x_next - mean) ** 2), of_samples(std)
    return -square / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def kl(
    mean: Float[Array, "B ..."], mean_ref: Float[Array, "B ..."], std: Level
) -> Float[Array, " B"]:
    """KL of two steps with one std: `(mean - mean_ref)^2 / (2 std^2)`, mean over latent dims."""
    mean, mean_ref, std = _float32(mean, mean_ref, std)
    return _mean_over_latent((mean - mean_ref) ** 2) / (2 * of_samples(std) ** 2)


def of_samples(std: Float[Array, "..."]) -> Float[Array, "..."]:
    """A step's std as `[B]`, or as the one number that it is."""
    return std.reshape(-1) if std.ndim else std


def _mean_over_latent(x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _float32(*values) -> tuple[Array, ...]:
    return tuple(jnp.asarray(value, jnp.float32) for value in values)
