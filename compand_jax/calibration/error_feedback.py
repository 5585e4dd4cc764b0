"""Rounding weights one input at a time, the rest making up for the error.

Rounding a row w to q changes the layer's output by e^T H e in square, e = w - q, H being the second
moments of the inputs (`unrolling`). Once inputs 1..k are rounded, the best values for those that
are not yet are in closed form; with the Cholesky factor U^T U = H^-1, U upper triangular,

    q_k = Q(w_k)        w_j <- w_j - U_kj (w_k - q_k) / U_kk        for all j > k

Inputs are taken in order of falling H_kk, and H is damped on its diagonal. This is the algorithm of
Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers",
ICLR 2023, after Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", NIPS 1992; Q is here a mu-law quantizer.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compand_jax.core.codebooks import Spec
from compand_jax.core.quantizers import fake_quantize

# Of the mean of the diagonal, as in GPTQ's section 3.3.
_DAMPING = 0.01


@functools.partial(jax.jit, static_argnames="spec")
def round_with_feedback(
    rows: Float[Array, "rows n"],
    moments: Float[Array, "n n"],
    mu: Float[Array, ""],
    scales: Float[Array, "rows"],
    spec: Spec,
) -> Float[Array, "rows n"]:
    """Returns levels for the weights, chosen so that the layer's output changes little.

    Args:
      rows: the weights, a row an output feature.
      moments: H = sum_t x_t x_t^T of the inputs, by any factor.
      mu: curvature, at least 0.
      scales: clip of each row, in the units of the weights.
      spec: the quantizer.

    Returns:
      Values that the quantizer leaves as they are: of each row those with feedback, or Q(rows)
      where that changes the output less, as it may with few inputs.
    """
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

    quantize = functools.partial(
        fake_quantize,
        mu=mu,
        scale=scales[:, None],
        bits=spec.bits,
        signed=spec.signed,
        grid=spec.grid,
    )

    def round_next(k: Array, rows: Array) -> Array:
        column = jax.lax.dynamic_slice_in_dim(rows, k, 1, 1)
        quantized = quantize(column)
        factors = jax.lax.dynamic_slice_in_dim(upper, k, 1, 0)
        factors = factors / jax.lax.dynamic_slice_in_dim(factors, k, 1, 1)
        rows = rows - (column - quantized) * factors
        return jax.lax.dynamic_update_slice_in_dim(rows, quantized, k, 1)

    rounded = jax.lax.fori_loop(0, len(moments), round_next, rows[:, order])
    rounded, plain = rounded[:, jnp.argsort(order)], quantize(rows)

    def output_error(quantized: Array) -> Array:
        change = rows - quantized
        return jnp.sum(change * jnp.matmul(change, moments, precision="highest"), 1, keepdims=True)

    return jnp.where(output_error(rounded) < output_error(plain), rounded, plain)
