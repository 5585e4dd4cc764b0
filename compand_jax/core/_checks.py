"""What the public functions require of their arguments."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

if TYPE_CHECKING:
    from compand_jax.core.spec import Spec


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the precision that companding runs in: float32, or float64 for float64 input."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def check_values(name: str, value: Any, dtype: Any, lowest: float, required: str) -> Array:
    """Returns an argument as an array of a dtype.

    Raises:
      TypeError: it is not numeric.
      ValueError: a value of it is below `lowest` or not finite. Only where values are at hand: a
        traced argument is not checked, and costs nothing.
    """
    if not isinstance(value, Tracer):
        try:
            with np.errstate(over="ignore"):
                host = np.asarray(value).astype(dtype)  # 1e-50 and 1e39 are 0 and inf there
        except (TypeError, ValueError):
            raise TypeError(
                f"`{name}` must be numeric, got {value!r}: give a number or an array"
            ) from None
        bad = ~((host >= lowest) & np.isfinite(host))
        if np.any(bad):
            first = np.asarray(value)[bad][0]
            raise ValueError(
                f"`{name}` must be {required} in {np.dtype(dtype).name}, got {first}: cj.fit gives "
                "one that fits"
            )
    return jnp.asarray(value, dtype)


def check_parameters(
    mu: ArrayLike | None,
    scale: ArrayLike,
    spec: "Spec",
    *,
    dtype: Any,
    like: tuple[str, tuple] | None = None,
) -> tuple[Array, Array]:
    """Returns mu, or a family's other parameters, and scale as arrays of a dtype.

    Raises ValueError where they cannot be. `like` names the operand that they must broadcast to,
    and gives its shape. Values are checked only where they are at hand: a traced mu costs nothing.
    """
    family, own = spec.family, len(spec.family.shape(spec))
    if family.parameter is None:
        mu = _no_parameters(mu, family.name, dtype)
    else:
        mu = check_values("mu", mu, dtype, family.lowest, family.required)
    if own and mu.shape[-own:] != family.shape(spec):
        raise ValueError(
            f"`mu` must be {family.required}: of shape {family.shape(spec)}, behind the axes that "
            f"broadcast, got {mu.shape}: cj.fit gives some that fit"
        )
    # A smaller scale is taken for zero by the processor.
    scale = check_values("scale", scale, dtype, float(np.finfo(dtype).tiny), "positive and finite")
    for name, shape in (("mu", mu.shape[: mu.ndim - own]), ("scale", scale.shape)):
        if like is not None and shape and not _broadcasts_to(shape, like[1]):
            raise ValueError(
                f"`{name}` must be a scalar or broadcast to `{like[0]}` at the same rank, "
                f"got shape {shape} for {like[1]}: give axes that it does not vary along "
                "the size 1"
            )
    return mu, scale


def _no_parameters(mu: Any, quantizer: str, dtype: Any) -> Array:
    """Returns 0, which stands for a family's parameters where it has none."""
    is_known = not isinstance(mu, Tracer)
    if mu is not None and (np.ndim(mu) or (is_known and np.any(np.asarray(mu) != 0))):
        raise ValueError(
            f"`mu` must be None for quantizer={quantizer!r}, which has no parameters, got {mu!r}: "
            "leave it None"
        )
    return jnp.zeros((), dtype)


def _broadcasts_to(shape: tuple, target: tuple) -> bool:
    pairs = zip(shape, target, strict=False)
    return len(shape) == len(target) and all(n in (1, m) for n, m in pairs)


def check_operands(
    x: ArrayLike, mu: ArrayLike | None, scale: ArrayLike, spec: "Spec"
) -> tuple[Array, Array, Array]:
    """Returns x, and mu and scale in the precision that x is quantized in."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating, got {x.dtype}: convert it with x.astype(float)")
    return x, *check_parameters(mu, scale, spec, dtype=compute_dtype(x.dtype), like=("x", x.shape))


def check_codes(codes: Array, low: int, top: int, bits: int) -> None:
    """Raises ValueError where a concrete code is not in [low, top]."""
    if isinstance(codes, Tracer) or codes.size == 0:
        return
    host = np.asarray(codes)
    if host.min() < low or host.max() > top:
        raise ValueError(
            f"`codes` must be in [{low}, {top}] at {bits} bits, got {host.min()} to {host.max()}: "
            "give the bits, signed and grid that they were made with"
        )
