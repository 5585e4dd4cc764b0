"""The scales of quantizers whose mu is given, vectorized over rows of values.

The search starts from a grid and goes on in closed form: for given codes, with q = Q(x; mu, c), the
error is a parabola in c whose minimum is at c (1 + <x - q, q> / <q, q>).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compand_jax.calibration.samples import Sample
from compand_jax.core.companding import mu_law_compress, mu_law_expand
from compand_jax.core.families.base import Compander
from compand_jax.core.families.mu_law import MuLaw
from compand_jax.core.quantizers import fake_quantize
from compand_jax.core.spec import Spec

# Where each scale has few values, a quantizer compares with every threshold: of so many, the curve
# itself is faster, and compiled in a third of the time.
_MANY_THRESHOLDS = 64


@jax.jit
def power(sample: Sample) -> Float[Array, "scales"]:
    """Returns <x, x> of the values of each scale."""
    return sample.per_scale(sample.values * sample.weighted(sample.values))


@jax.jit
def percentile_scales(sample: Sample, percent: Float[Array, ""]) -> Float[Array, "scales"]:
    """Returns the smallest magnitude that at least so many percent do not exceed, or the largest.

    The largest is also taken where the percentile is zero.
    """
    magnitudes = jnp.abs(sample.values)
    order = jnp.argsort(magnitudes, 1)
    counts = jnp.broadcast_to(sample.weights, magnitudes.shape)
    below = jnp.cumsum(jnp.take_along_axis(counts, order, 1), 1)
    enough = below >= below[:, -1:] * (percent / 100) * (1 - 1e-6)  # to the sum's rounding
    rank = jnp.argmax(enough, 1)
    scale = jnp.take_along_axis(magnitudes, jnp.take_along_axis(order, rank[:, None], 1), 1)[:, 0]
    scale = jnp.where((percent >= 100) | (scale == 0), sample.absmax, scale)
    return jnp.where(scale > 0, scale, 1)


@functools.partial(jax.jit, static_argnames="spec")
def starting_scales(
    sample: Sample, mus: Float[Array, "scales ..."], exponents: Float[Array, "k"], spec: Spec
) -> Float[Array, "k scales"]:
    """Returns scales to start from, by exponent: at 0 the largest magnitude has the top level."""
    absmax = jnp.where(sample.absmax > 0, sample.absmax, 1)
    # A midrise grid's top level lies below the scale; at this scale it is the largest magnitude.
    top = 1 - 0.5 / spec.steps if spec.midrise else 1.0
    if isinstance(spec.family, Compander):
        highest = absmax / spec.family.expand(jnp.full_like(mus, top), mus)
    else:
        highest = absmax / spec.family.table(mus, spec)[0][..., -1]
    mean = _mean_magnitude(sample)
    lowest = jnp.clip(0.25 * mean, highest * 2.0**-12, highest / 2)
    return highest[None] * (lowest / highest)[None] ** exponents[:, None]


def _mean_magnitude(sample: Sample) -> Float[Array, "scales"]:
    """Returns the mean of the magnitudes that are not zero; 0 where there are none."""
    magnitudes = jnp.abs(sample.values)
    counts = jnp.where(magnitudes > 0, sample.weights if sample.counted else 1.0, 0.0)
    sums, counts = jnp.sum(counts * magnitudes, 1), jnp.sum(counts, 1)
    if len(sample.absmax) < len(sums):
        sums, counts = jnp.sum(sums, keepdims=True), jnp.sum(counts, keepdims=True)
    return sums / jnp.maximum(counts, 1)


@functools.partial(jax.jit, static_argnames=("spec", "descents"))
def best_scales(
    sample: Sample,
    mus: Float[Array, "scales ..."],
    starts: Float[Array, "k scales"],
    spec: Spec,
    descents: int,
) -> tuple[Float[Array, "scales"], Float[Array, "scales"]]:
    """Returns the best scales that were met, going on from the best start, and their errors."""
    weighted_values = sample.weighted(sample.values)

    def attempt(scale: Array) -> tuple[Array, Array, Array]:
        quantized = _quantize(sample.values, mus[:, None], scale[:, None], spec)
        # Computed once for the three sums.
        quantized = jax.lax.optimization_barrier(quantized)
        residual = sample.values - quantized
        weighted_residual = sample.weighted(residual)
        error = sample.per_scale(residual * weighted_residual)
        gain = sample.per_scale(quantized * weighted_residual)
        power = sample.per_scale(quantized * weighted_values) - gain
        step = jnp.where(power > 0, gain / jnp.where(power > 0, power, 1), 0)
        return error, scale * jnp.maximum(1 + step, 0.5), error - step * gain

    errors, onward, bounds = jax.lax.map(attempt, starts)
    best, lowest = jnp.argmin(errors, 0)[None], jnp.argmin(bounds, 0)[None]

    def descend(_: Array, state: tuple) -> tuple:
        scale, error, onward = state
        new, further, _ = attempt(onward)
        return jnp.where(new < error, onward, scale), jnp.minimum(new, error), further

    state = [jnp.take_along_axis(a, i, 0)[0]
             for a, i in ((starts, best), (errors, best), (onward, lowest))]  # fmt: skip
    scale, error, _ = jax.lax.fori_loop(0, descents, descend, tuple(state))
    return jnp.where(sample.absmax > 0, scale, 1), error


def _quantize(x: Array, mu: Array, scale: Array, spec: Spec) -> Array:
    """Returns `fake_quantize`'s values, but for rounding where there are many thresholds."""
    steps, family = spec.steps, spec.family
    if steps < _MANY_THRESHOLDS or not isinstance(family, MuLaw):
        p = None if family.parameter is None else mu
        return fake_quantize(x, p, scale, **spec.arguments)
    y = mu_law_compress(jnp.clip(x / scale, -1, 1), mu)
    if spec.midrise:
        y_q = (jnp.clip(jnp.floor(steps * y), -steps, steps - 1) + 0.5) / steps
    else:
        y_q = jnp.round(steps * y) / steps
    return scale * mu_law_expand(y_q, mu)
