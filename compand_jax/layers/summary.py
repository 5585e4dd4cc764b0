"""A quantized model as a table: one row per site, and what is left in full precision."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import Array

from compand_jax.core.quantizers import fake_quantize
from compand_jax.layers import parametrization as par
from compand_jax.layers.groups import grouped
from compand_jax.layers.sites import Site
from compand_jax.layers.standardization import moments

_HEADER = (
    "site", "weight bits", "weight mu", "weight scale", "SQNR dB", "bytes", "float32 bytes",
    "act bits", "act mu", "act scale", "act signed", "bits/weight",
)  # fmt: skip
WEIGHT_NAMES = ("kernel", "embedding")


def site_weight(params: Mapping[str, Any], name: str) -> Any:
    """Returns the weight under a site's path in `params`; None where it has another name.

    The path is that of a module, or of the parameter itself.
    """
    module = meta.unbox(_module(params, name))
    if not isinstance(module, Mapping):
        return module
    return next((module[key] for key in WEIGHT_NAMES if key in module), None)


def _module(params: Any, name: str) -> Any:
    """Returns the parameters of the module of that name, in which modules' own may have slashes."""
    if not name:
        return params
    for key, inner in params.items() if isinstance(params, Mapping) else ():
        if f"{name}/".startswith(f"{key}/"):
            found = _module(inner, name[len(key) + 1 :])
            if found is not None:
                return found
    return None


def summarize(
    params: Mapping[str, Any],
    quantizers: Mapping[str, Mapping[str, Any]],
    sites: Mapping[str, Site],
) -> str:
    """Returns the table that `QuantizedModel.summary` describes."""
    rows = [_row(name, sites[name], found, params) for name, found in quantizers.items()]
    quantized = {name for name, found in quantizers.items() if "weight_scale" in found}
    left = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(meta.unbox(params))
        if np.ndim(leaf) > 1 and not _is_quantized(params, quantized, [key.key for key in path])
    ]
    return f"{align([_HEADER, *rows])}\nweights not quantized: {', '.join(left) or 'none'}"


def _is_quantized(params: Mapping[str, Any], quantized: set[str], path: list[str]) -> bool:
    """Whether a leaf is a quantized layer's weight, or its bias, which multiplies nothing.

    Others in the same module the layer multiplies by itself. Where it has no weight of a known
    name, the weight is computed from them.
    """
    *module, leaf = path
    name = "/".join(module)
    if "/".join(path) in quantized:
        return True
    if name not in quantized:
        return False
    return leaf in (*WEIGHT_NAMES, "bias") or site_weight(params, name) is None


def _row(name: str, site: Site, found: Mapping[str, Any], params: Mapping) -> tuple[str, ...]:
    weight, act, whole = ["-"] * 6, ["-"] * 4, "-"
    kernel = site_weight(params, name)
    if "weight_scale" in found:
        spec, scale = site.spec("weight"), found["weight_scale"]
        mu = par.entry(found, "weight", spec)
        weight[:3] = str(site.weight_bits), _shown(found, "weight", site), _range(scale)
        if kernel is not None:
            mus = 0 if mu is None else mu.size
            stored = site.weight_bytes(kernel.size, scale.size, mus)
            weight[3] = _sqnr(kernel, mu, scale, site)
            weight[4] = str(-(-kernel.size * spec.bits // 8))
            whole = f"{8 * stored / max(kernel.size, 1):.3g}"
    if kernel is not None:
        weight[5] = str(4 * kernel.size)
    if "act_scale" in found:
        act = [
            str(site.act_bits), _shown(found, "act", site), _range(found["act_scale"]),
            "yes" if site.act_signed else "no",
        ]  # fmt: skip
    return (name or "(model)", *weight, *act, whole)


def _shown(found: Mapping[str, Any], operand: str, site: Site) -> str:
    """Returns the range of a quantizer's parameters, with their name unless it is mu."""
    name = par.entry_name(operand, site.quantizer)
    if name is None:
        return site.quantizer
    word = name.removeprefix(f"{operand}_")
    return _range(found[name]) if word == "mu" else f"{word} {_range(found[name])}"


def _sqnr(kernel: Array, mu: Array | None, scale: Array, site: Site) -> str:
    spec = site.spec("weight")
    kernel = grouped(kernel, scale.shape, site.group_size)
    if mu is not None:
        stack = mu.ndim - len(spec.family.shape(spec))
    else:  # as many axes as the layers' scales have, unless they broadcast to the kernel
        alike = scale.ndim < kernel.ndim and scale.shape == kernel.shape[: scale.ndim]
        stack = scale.ndim if alike else 0
    if not stack and scale.ndim:  # one of a stack's layers has fewer axes than the stack
        scale = scale.reshape((1,) * (kernel.ndim - scale.ndim) + scale.shape)
        if any(n not in (1, size) for n, size in zip(scale.shape, kernel.shape, strict=True)):
            return "-"
    quantize = functools.partial(_quantized, site=site)
    for _ in range(stack):  # each of a stack's layers has its own
        quantize = jax.vmap(quantize)
    quantized = quantize(kernel, mu, scale)
    exact, quantized = np.asarray(kernel, np.float64), np.asarray(quantized, np.float64)
    noise, power = np.sum((exact - quantized) ** 2), np.sum(exact**2)
    return f"{10 * np.log10(power / noise):.1f}" if noise and power else "inf"


def _quantized(kernel: Array, mu: Array | None, scale: Array, *, site: Site) -> Array:
    """Returns a kernel's levels, the scale being in its units."""
    spec, kernel = site.spec("weight"), jnp.asarray(kernel)
    mean = moments(kernel)[0] if site.weight_standardization else jnp.zeros((), kernel.dtype)
    quantized = fake_quantize(kernel - mean, mu, scale, **spec.arguments)
    return mean + quantized


def _range(values: Any) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"


def align(rows: list[tuple[str, ...]]) -> str:
    """Returns rows as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
