"""Where the bytes of a frozen model are, and how few its codes could take."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from compand_jax.frozen.packing import unpack
from compand_jax.frozen.tree import Arrays, FrozenSite
from compand_jax.layers.summary import align

_HEADER = ("site", "shape", "bits", "packed bytes", "table bytes", "entropy bits", "ideal bytes",
           "float32 bytes", "ratio", "bits/weight")  # fmt: skip
_TABLES = ("levels", "scales", "scale_units")


def entropy(codes: UInt8[np.ndarray, "..."]) -> float:
    """Returns the mean bits per code of an ideal coder: -sum p log2 p, p the codes' shares.

    >>> entropy(np.array([0, 0, 1, 1, 2, 2, 3, 3], np.uint8))
    2.0
    """
    if codes.size == 0:
        return 0.0
    counts = np.bincount(codes.reshape(-1))
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def summarize_frozen(sites: Mapping[str, FrozenSite], arrays: Arrays) -> str:
    """Returns the table that `FrozenModel.summary` describes."""
    rows, totals = [], np.zeros(4)
    host = jax.device_get(arrays)
    for name, site in sites.items():
        weight = site.weight
        if weight is None:
            continue
        packed = host["codes"][name]
        bits = entropy(np.asarray(unpack(jnp.asarray(packed), weight.bits, weight.shape)))
        count = math.prod(weight.shape)
        tables = sum(host[kind][name].nbytes for kind in _TABLES if name in host[kind])
        sizes = packed.nbytes, tables, math.ceil(count * bits / 8), 4 * count
        totals += sizes
        shape = "x".join(map(str, weight.shape))
        rows.append(_row(name or "(model)", shape, weight.bits, bits, sizes))
    rest = sum(x.nbytes for kind in ("variables", "shifts") for x in host[kind].values())
    books = sum(x.nbytes for kind in ("act_levels", "act_thresholds") for x in host[kind].values())
    whole = tuple(totals + np.array([rest, books, rest, rest]))
    return align([
        _HEADER,
        *rows,
        _row("full precision", "-", None, None, (rest, 0, rest, rest)),
        _row("activation codebooks", "-", None, None, (0, books, 0, 0)),
        _row("all", "-", None, None, whole),
    ])  # fmt: skip


def _row(
    name: str, shape: str, bits: int | None, per_code: float | None, sizes: tuple
) -> tuple[str, ...]:
    packed, tables, ideal, full = (int(size) for size in sizes)
    ratio = f"{full / (packed + tables):.2f}" if packed + tables and full else "-"
    # float32 bytes are four for each weight.
    per_weight = f"{32 * (packed + tables) / full:.3g}" if bits and full else "-"
    return (
        name,
        shape,
        "-" if bits is None else str(bits),
        str(packed),
        str(tables),
        "-" if per_code is None else f"{per_code:.2f}",
        str(ideal),
        str(full),
        ratio,
        per_weight,
    )
