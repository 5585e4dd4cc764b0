"""The mu-law curve and its inverse on [-1, 1].

With L = log(1 + mu) and v = |x|, the curve compresses, its inverse expands:

    F(v) = log(1 + mu v) / L          G(y) = (exp(y L) - 1) / mu

Both are odd and the identity at mu = 0. They are evaluated as

    F(v) = v q(mu v) / q(mu)          G(y) = y r(y L) q(mu)

with q(z) = log1p(z)/z and r(z) = expm1(z)/z, which are smooth through z = 0, so that nothing
is divided by mu.

Source: Osama, Madian, Fouda, "Companding quantization for deep neural networks", Applied Soft
Computing 185, 113979, 2025, doi 10.1016/j.asoc.2025.113979; the curve is that of ITU-T G.711.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from compand_jax.core._checks import check_values, compute_dtype
from compand_jax.core._series import expm1_ratio, log1p_ratio


def mu_law_compress(x: ArrayLike, mu: ArrayLike) -> Float[Array, "..."]:
    """Returns x compressed by the mu-law curve, sign(x) log(1 + mu |x|) / log(1 + mu).

    Args:
      x: Values in [-1, 1], any shape, floating.
      mu: Curvature, at least 0, without unit; a scalar, or an array that broadcasts to x. At 0
        the curve is the identity, exactly.

    Returns:
      Values in [-1, 1], of x's shape and dtype; computed in float32 or wider.

    Gradient: with L = log(1 + mu) and the result F,
      in x: mu / (L (1 + mu |x|)), which is 1 at mu = 0;
      in mu: sign(x) [|x|/(1 + mu |x|) - |F|/(1 + mu)] / L, which is sign(x) |x| (1 - |x|)/2 at
        mu = 0.

    Raises:
      TypeError: x is not floating, or mu is not numeric.
      ValueError: a concrete mu is negative or not finite.

    >>> float(mu_law_compress(0.5, mu=0.0))
    0.5
    >>> round(float(mu_law_compress(0.1, mu=255.0)), 4)
    0.591
    """
    x = jnp.asarray(x)
    v, sign, mu = _magnitude_sign_mu("x", x, mu)
    return (sign * v * log1p_ratio(mu * v) / log1p_ratio(mu)).astype(x.dtype)


def mu_law_expand(y: ArrayLike, mu: ArrayLike) -> Float[Array, "..."]:
    """Returns the inverse of `mu_law_compress`, sign(y) ((1 + mu)^|y| - 1) / mu.

    Args:
      y: Values in [-1, 1], any shape, floating.
      mu: Curvature, at least 0, without unit; a scalar, or an array that broadcasts to y. At 0
        the curve is the identity, exactly.

    Returns:
      Values in [-1, 1], of y's shape and dtype; computed in float32 or wider.

    Gradient: with L = log(1 + mu) and the result G,
      in y: L (1 + mu |G|) / mu, which is 1 at mu = 0;
      in mu: sign(y) [|y| (1 + mu |G|)/(1 + mu) - |G|] / mu, which is sign(y) |y| (|y| - 1)/2 at
        mu = 0.

    Raises:
      TypeError: y is not floating, or mu is not numeric.
      ValueError: a concrete mu is negative or not finite.

    >>> float(mu_law_expand(0.5, mu=0.0))
    0.5
    >>> round(float(mu_law_expand(mu_law_compress(0.1, 5.0), 5.0)), 6)
    0.1
    """
    y = jnp.asarray(y)
    w, sign, mu = _magnitude_sign_mu("y", y, mu)
    return (sign * w * expm1_ratio(w * jnp.log1p(mu)) * log1p_ratio(mu)).astype(y.dtype)


def _magnitude_sign_mu(name: str, x: Array, mu: ArrayLike) -> tuple[Array, Array, Array]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be floating, got {x.dtype}: convert it with {name}.astype(float)"
        )
    dtype = compute_dtype(x.dtype)
    mu = check_values("mu", mu, dtype, 0.0, "at least 0 and finite")
    x = x.astype(dtype)
    # Not jnp.abs, whose slope at 0 is 0: the curve passes through 0 with a slope of its own.
    return jnp.where(x < 0, -x, x), jnp.where(x < 0, -1, 1).astype(dtype), mu
