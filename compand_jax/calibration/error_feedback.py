"""Rounding weights one input at a time, the rest making up for the error.

Rounding a row w to q changes the layer's output by e^T H e in square, e = w - q, H being the second
moments of the inputs (`unrolling`). Once inputs 1..k are rounded, the best values for those that
are not yet are in closed form; with the Cholesky factor U^T U = H^-1, U upper triangular,

    q_k = Q(w_k)        w_j <- w_j - U_kj (w_k - q_k) / U_kk        for all j > k

Inputs are taken in order of falling H_kk, and H is damped on its diagonal. The update reaches the
inputs of the same block at once, all others once the block is through. This is the algorithm of
Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers",
ICLR 2023, after Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", NIPS 1992; Q is here any of our quantizers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from compand_jax.core._xla import take
from compand_jax.core.codebooks import half_table
from compand_jax.core.quantizers import fake_quantize
from compand_jax.core.spec import Spec

# Of the mean of the diagonal, as in GPTQ's section 3.3.
_DAMPING = 0.01
# Inputs, as in section 3.3, step 2: the update of all that is left is then bound by arithmetic.
_BLOCK = 128


@functools.partial(jax.jit, static_argnames="spec")
def round_with_feedback(
    rows: Float[Array, "rows n"],
    moments: Float[Array, "n n"],
    mu: Float[Array, "..."],
    scales: Float[Array, "rows"] | Float[Array, "rows n"],
    spec: Spec,
) -> Float[Array, "rows n"]:
    """Returns levels for the weights, chosen so that the layer's output changes little.

    Args:
      rows: the weights, a row an output feature.
      moments: H = sum_t x_t x_t^T of the inputs, by any factor.
      mu: curvature, at least 0, or the parameters of another family.
      scales: clip of each row, or of each weight, in the units of the weights. It is held fixed.
      spec: the quantizer.

    Returns:
      Values that the quantizer leaves as they are: of each row those with feedback, or Q(rows)
      where that changes the output less, as it may with few inputs.
    """
    scales = scales[:, None] if scales.ndim == 1 else scales
    diagonal = jnp.diagonal(moments)
    order = jnp.argsort(-diagonal)
    damped = moments[order][:, order]
    # Where all inputs are zero nothing matters, and anything will do.
    damping = jnp.where(jnp.any(diagonal > 0), _DAMPING * jnp.mean(diagonal), 1)
    damped = damped + damping * jnp.eye(len(moments), dtype=moments.dtype)
    # The rows and columns in reverse make the lower factor of H an upper one of its inverse.
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    identity = jnp.eye(len(moments), dtype=moments.dtype)
    upper = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]

    own = scales if scales.shape[1] == 1 else scales[:, order]
    rounded = _round_in_blocks(rows[:, order].T, upper, mu, own.T, spec).T
    p = None if spec.family.parameter is None else mu
    plain = fake_quantize(rows, p, scales, **spec.arguments)
    rounded = rounded[:, jnp.argsort(order)]

    def output_error(quantized: Array) -> Array:
        change = rows - quantized
        return jnp.sum(change * jnp.matmul(change, moments, precision="highest"), 1, keepdims=True)

    return jnp.where(output_error(rounded) < output_error(plain), rounded, plain)


def _round_in_blocks(
    columns: Float[Array, "n rows"],
    upper: Float[Array, "n n"],
    mu: Float[Array, "..."],
    scales: Float[Array, "n_or_1 rows"],
    spec: Spec,
) -> Float[Array, "n rows"]:
    """Returns levels, what is left to be rounded being updated after each block of inputs.

    Within a block its inputs alone are; of all others the sum over the block is one product.
    """
    n = len(columns)
    block = min(_BLOCK, n)
    rest = -n % block
    # An input more, whose factors are all zero, changes nothing.
    columns = jnp.pad(columns, ((0, rest), (0, 0)))
    scales = jnp.pad(jnp.broadcast_to(scales, (n, columns.shape[1])), ((0, rest), (0, 0)), "edge")
    factors = jnp.pad(upper / jnp.diagonal(upper)[:, None], ((0, rest), (0, rest)))
    # Outside of the loop, so that it is made once. A table of any scale is its multiple.
    levels, thresholds = half_table(mu, jnp.ones((), mu.dtype), spec)
    side = "right" if spec.midrise else "left"  # at a tie: the outer level, or the inner one

    def quantize(column: Array, scale: Array) -> Array:
        count = functools.partial(jnp.searchsorted, side=side, method="scan_unrolled")
        magnitude = jnp.abs(column) if spec.signed else jnp.maximum(column, 0)
        own = scale[:, None] * thresholds[None]
        level = scale * take(levels, jax.vmap(count)(own, magnitude))
        return jnp.where(column < 0, 0 - level, level)

    def round_block(b: Array, columns: Array) -> Array:
        start = b * block
        own = lax.dynamic_slice_in_dim(columns, start, block)
        own_scales = lax.dynamic_slice_in_dim(scales, start, block)
        onward = lax.dynamic_slice_in_dim(factors, start, block)
        within = lax.dynamic_slice_in_dim(onward, start, block, 1)

        def round_next(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            own, errors = state
            quantized = quantize(own[k], own_scales[k])
            error = own[k] - quantized
            own = own - within[k][:, None] * error[None]
            return own.at[k].set(quantized), errors.at[k].set(error)

        own, errors = lax.fori_loop(0, block, round_next, (own, jnp.zeros_like(own)))
        # The block's own rows are overwritten, those before it have factors of zero.
        columns = columns - jnp.matmul(onward.T, errors, precision="highest")
        return lax.dynamic_update_slice_in_dim(columns, own, start, 0)

    return lax.fori_loop(0, (n + rest) // block, round_block, columns)[:n]
