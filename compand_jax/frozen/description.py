"""A frozen model's static facts and arrays as a file holds them, and back, every one checked."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compand_jax.core.spec import check_spec
from compand_jax.frozen.file import is_shape, wrong_file
from compand_jax.frozen.folded_norms import NORM_LEAVES
from compand_jax.frozen.packing import pack, packed_bytes, unpack
from compand_jax.frozen.sample import Signature, call_from_json, call_to_json
from compand_jax.frozen.tree import (
    KINDS,
    TYPES,
    WEIGHT_TYPES,
    Arrays,
    FrozenSite,
    FrozenWeight,
    split_path,
)
from compand_jax.layers.config import ACT_SITES, SCALE_DTYPES

_FIELDS = {"act_site", "signature", "sites", "variables", "info"}
_LATER = {"group_size": None, "scale_dtype": "float32"}
ENCODINGS = ("packed", "zlib")

_MAX_DEPTH = 64
"""Modules within each other."""

_MAX_RATIO = 64
"""How much larger than their compressed bytes codes may be: so a reader's memory is bounded."""


def to_file(
    sites: Mapping[str, FrozenSite],
    act_site: str,
    signature: Signature,
    arrays: Arrays,
    compress: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description and the arrays, by name, that a file of the model holds.

    Args:
      sites: The model's.
      act_site: The model's.
      signature: The model's.
      arrays: The model's.
      compress: Whether to store codes by zlib, one byte each, where that takes fewer bytes.
    """
    for name, x in arrays["variables"].items():
        _check_type(name, x)
    host = jax.device_get(arrays)
    encodings = {}
    for site, packed in host["codes"].items() if compress else ():
        weight = sites[site].weight
        assert weight is not None
        codes = np.asarray(unpack(jnp.asarray(packed), weight.bits, weight.shape))
        compressed = _deflated(codes.tobytes())
        if len(compressed) < len(packed) and codes.size <= _MAX_RATIO * len(compressed):
            host["codes"][site] = np.frombuffer(compressed, np.uint8)
            encodings[site] = "zlib"
    description = {
        "act_site": act_site,
        "signature": {
            "call": None if signature.call is None else call_to_json(signature.call),
            "initial": signature.initial,
        },
        "sites": {
            name: {"encoding": encodings.get(name, "packed"), **_site_fields(site)}
            for name, site in sites.items()
        },
        "variables": {name: x.dtype.name for name, x in host["variables"].items()},
    }
    stored = {
        f"{kind}/{name}": np.asarray(x) if kind == "scales" else _as_stored(x)
        for kind, found in host.items()
        for name, x in found.items()
    }
    return description, stored


def _site_fields(site: FrozenSite) -> dict[str, Any]:
    """Returns a site's fields; those of weights that the first files had not only where needed."""
    fields = dataclasses.asdict(site)
    for name, default in _LATER.items():
        if fields["weight"] and fields["weight"][name] == default:
            del fields["weight"][name]
    return fields


def _deflated(data: bytes) -> bytes:
    """Returns data under zlib, with or without the search for repetitions, whichever is shorter.

    Codes seldom repeat: a Huffman code alone is mostly the better one, and near the entropy.
    """
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        stream = zlib.compressobj(9, strategy=strategy)
        found.append(stream.compress(data) + stream.flush())
    return min(found, key=len)


def _check_type(name: str, x: Any) -> None:
    found = x.dtype.name if isinstance(x, jax.Array) else type(x).__name__
    if found not in TYPES:
        raise ValueError(
            f"`variables` must be of {', '.join(TYPES)} to be saved, got {found} in {name}: "
            "convert it"
        )


def _as_stored(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)


def from_file(
    path: str | Path, description: Mapping[str, Any], stored: Mapping[str, np.ndarray]
) -> tuple[dict[str, FrozenSite], str, Signature, Arrays]:
    """Returns what `to_file` took: sites, act_site, signature and arrays.

    Raises:
      ValueError: something is missing, unknown, of another shape than described, out of range, or
        a table is not in ascending order.
    """
    try:
        return _from_file(description, stored)
    except _UnexpectedError as error:
        raise wrong_file(path, str(error)) from None


class _UnexpectedError(Exception):
    """What was found in a file instead of what belongs there."""


def _require(condition: bool | np.bool_, found: str) -> None:
    if not condition:
        raise _UnexpectedError(found)


def _from_file(
    description: Mapping[str, Any], stored: Mapping[str, np.ndarray]
) -> tuple[dict[str, FrozenSite], str, Signature, Arrays]:
    _require(description.keys() == _FIELDS, f"not the fields {', '.join(sorted(_FIELDS))}")
    act_site, described = description["act_site"], description["sites"]
    _require(act_site in ACT_SITES, "no act_site")
    for name in ("sites", "variables", "info"):
        _require(isinstance(description[name], dict), f"{name} that are no object")
    sites = {name: _site(name, fields) for name, fields in described.items()}
    arrays: Arrays = {kind: {} for kind in KINDS}
    for name, x in stored.items():
        kind, _, rest = name.partition("/")
        _require(kind in KINDS, f"an array {name[:80]!r} of no known kind")
        arrays[kind][rest] = x
    weights = {name: site.weight for name, site in sites.items() if site.weight is not None}
    norms = {name: weight.norm for name, weight in weights.items() if weight.norm is not None}
    _require(len(set(norms.values())) == len(norms), "a batch norm folded into two weights")
    with_act = {name for name, site in sites.items() if site.act_bits is not None}
    for kind, names in (
        ("codes", weights.keys()),
        ("levels", weights.keys()),
        ("scales", {name for name, weight in weights.items() if weight.scale_shape}),
        ("scale_units", {name for name, w in weights.items() if w.scale_dtype == "uint8"}),
        ("shifts", norms.keys()),
        ("act_levels", with_act),
        ("act_thresholds", with_act),
        ("variables", description["variables"].keys()),
    ):
        _require(arrays[kind].keys() == names, f"other {kind} than described")
    for name, weight in weights.items():
        codes, encoding = arrays["codes"][name], described[name]["encoding"]
        arrays["codes"][name] = _codes(name, weight, codes, encoding)
        _check_tables(name, weight, arrays)
    for name, site in sites.items():
        if site.act_bits is not None:
            _check_codebook(name, site, arrays["act_levels"][name], arrays["act_thresholds"][name])
    _check_paths(weights, arrays["variables"])
    arrays["variables"] = _variables(description["variables"], arrays["variables"])
    return sites, act_site, _signature(description["signature"]), arrays


def _site(name: str, fields: Any) -> FrozenSite:
    keys = {"encoding", "weight", "act_bits", "act_signed"}
    _require(isinstance(fields, dict) and fields.keys() == keys, f"other fields of site {name!r}")
    _require(fields["encoding"] in ENCODINGS, f"an unknown encoding of site {name!r}")
    bits, signed = fields["act_bits"], fields["act_signed"]
    _require(type(signed) is bool, f"no sign of site {name!r}")
    if bits is not None:
        _check_bits(name, bits, signed, "midtread")
    weight = None if fields["weight"] is None else _weight(name, fields["weight"])
    return FrozenSite(weight, bits, signed)


def _weight(name: str, fields: Any) -> FrozenWeight:
    keys = {field.name for field in dataclasses.fields(FrozenWeight)}
    fields = _LATER | fields if isinstance(fields, dict) else fields
    _require(isinstance(fields, dict) and fields.keys() == keys, f"other fields of weight {name!r}")
    _check_bits(name, fields["bits"], True, fields["grid"])
    _require(fields["dtype"] in WEIGHT_TYPES, f"an unknown type of weight {name!r}")
    for key in ("leaf", "norm"):
        _require(fields[key] is None or isinstance(fields[key], str), f"no {key} of site {name!r}")
    of_leaf = fields["leaf_shape"] is not None
    known = fields["leaf_dtype"] in WEIGHT_TYPES if of_leaf else fields["leaf_dtype"] is None
    of_one = not of_leaf or fields["leaf"] is not None
    _require(known and of_one, f"no leaf_dtype of weight {name!r}")
    shapes = {}
    for key in ("shape", "scale_shape", "leaf_shape"):
        shape = fields[key]
        optional = key == "leaf_shape" and shape is None
        _require(optional or is_shape(shape), f"no {key} of weight {name!r}")
        shapes[key] = tuple(shape or ()) if not optional else None
    size = fields["group_size"]
    _require(size is None or (type(size) is int and size > 0), f"no group size of weight {name!r}")
    _require(fields["scale_dtype"] in SCALE_DTYPES, f"an unknown scale_dtype of weight {name!r}")
    weight = FrozenWeight(**(fields | shapes))
    _require(weight.scales_fit, f"scales of another shape than weight {name!r}")
    return weight


def _check_bits(name: str, bits: Any, signed: bool, grid: Any) -> None:
    _require(type(bits) is int and isinstance(grid, str), f"no bits or grid of site {name!r}")
    try:
        check_spec(bits, signed, grid)
    except ValueError as error:
        raise _UnexpectedError(f"site {name!r}: {error}") from error


def _codes(name: str, weight: FrozenWeight, codes: np.ndarray, encoding: str) -> np.ndarray:
    """Returns a site's codes, packed."""
    _require(codes.dtype == np.uint8 and codes.ndim == 1, f"codes of site {name!r} not in bytes")
    count = math.prod(weight.shape)
    if encoding == "zlib":
        unpacked = _inflated(name, codes, count)
        packed = np.asarray(pack(jnp.asarray(unpacked), weight.bits))
    else:
        expected = packed_bytes(count, weight.bits)
        _require(codes.size == expected, f"{codes.size} bytes, not {expected}, of site {name!r}")
        packed, unpacked = codes, np.asarray(unpack(jnp.asarray(codes), weight.bits, (count,)))
        rest = count * weight.bits % 8
        _require(rest == 0 or codes[-1] >> rest == 0, f"bits after the codes of site {name!r}")
    _require(unpacked.max(initial=0) < weight.levels, f"a code out of range in site {name!r}")
    return packed


def _inflated(name: str, codes: np.ndarray, count: int) -> np.ndarray:
    _require(count <= _MAX_RATIO * codes.size, f"more codes than bytes for them in site {name!r}")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(codes.tobytes(), count + 1)
    except zlib.error as error:
        raise _UnexpectedError(f"codes of site {name!r}: {error}") from error
    whole = stream.eof and not stream.unused_data and len(data) == count
    _require(whole, f"another number of codes than {count} in site {name!r}")
    return np.frombuffer(data, np.uint8)


def _check_tables(name: str, weight: FrozenWeight, arrays: Arrays) -> None:
    levels = arrays["levels"][name]
    stack = levels.shape[:-1]  # each of its layers has a table
    own = levels.shape == (*weight.shape[: len(stack)], weight.levels)
    _require(own, f"a table of another size in site {name!r}")
    _check_ascending(name, levels)
    # A batch norm that is folded gives each of the layer's features a scale and a shift.
    features = weight.scale_shape[-1:] if weight.group_size else (math.prod(weight.scale_shape),)
    scales = (*stack, *weight.scale_shape), weight.scale_dtype
    for kind, shape, dtype in (
        ("scales", *scales),
        ("scale_units", stack, "float32"),
        ("shifts", features, "float32"),
    ):
        if (x := arrays[kind].get(name)) is not None:
            _require(x.shape == shape, f"{kind} of another shape in site {name!r}")
            _check_finite(name, kind, x, dtype)


def _check_codebook(
    name: str, site: FrozenSite, levels: np.ndarray, thresholds: np.ndarray
) -> None:
    """Requires levels and thresholds to take turns, and to mirror each other where signed."""
    spec = check_spec(site.act_bits, site.act_signed)
    count = (1 + site.act_signed) * spec.steps + 1
    stack = levels.shape[:-1]
    sizes = levels.shape == (*stack, count) and thresholds.shape == (*stack, count - 1)
    _require(sizes, f"a codebook of another size in site {name!r}")
    for table in (levels, thresholds):
        _check_ascending(name, table)
    between = np.all(levels[..., :-1] <= thresholds) and np.all(thresholds <= levels[..., 1:])
    _require(between, f"thresholds that are not between the levels in site {name!r}")
    mirrored = levels == -levels[..., ::-1] if site.act_signed else levels[..., 0] == 0
    _require(np.all(mirrored), f"a codebook without symmetry in site {name!r}")


def _check_ascending(name: str, table: np.ndarray) -> None:
    _check_finite(name, "a table", table)
    ascending = np.all(np.diff(table, axis=-1) >= 0)
    _require(ascending, f"a table that is not in ascending order in site {name!r}")


def _check_finite(name: str, what: str, x: np.ndarray, dtype: str = "float32") -> None:
    finite = x.dtype == dtype and np.all(np.isfinite(x))
    _require(finite, f"{what} not of finite {dtype} in site {name!r}")


def _check_paths(weights: Mapping[str, FrozenWeight], variables: Mapping[str, Any]) -> None:
    """Requires a place of its own for every variable, weight and folded batch norm."""
    paths = [split_path(name) for name in variables]
    paths += [split_path(weight.leaf) for weight in weights.values() if weight.leaf]
    norms = [weight.norm for weight in weights.values() if weight.norm is not None]
    paths += [
        (collection, *split_path(name), leaf) for name in norms for collection, leaf in NORM_LEAVES
    ]
    # Before anything is made of them: jax runs through a tree by recursion.
    _require(all(len(path) <= _MAX_DEPTH for path in paths), "a variable in too many modules")
    above = {path[:i] for path in paths for i in range(1, len(path))}
    distinct = len(set(paths)) == len(paths) and above.isdisjoint(paths)
    _require(distinct, "a variable within another")


def _variables(types: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables in their own types."""
    for name, x in found.items():
        _require(types[name] in TYPES, f"an unknown type of variable {name[:80]!r}")
        floating = jnp.issubdtype(types[name], jnp.floating)
        stored = "float32" if floating else types[name]
        _require(x.dtype == stored, f"another type than described of variable {name[:80]!r}")
    return {name: jnp.asarray(x, types[name]) for name, x in found.items()}


def _signature(fields: Any) -> Signature:
    well_formed = isinstance(fields, dict) and fields.keys() == {"call", "initial"}
    _require(well_formed, "a signature that is none")
    initial = fields["initial"]
    if initial is not None:
        shapes = isinstance(initial, dict) and all(map(is_shape, initial.values()))
        _require(shapes, "a signature without shapes")
        initial = {name: tuple(shape) for name, shape in initial.items()}
    try:
        call = None if fields["call"] is None else call_from_json(fields["call"])
    except ValueError as error:
        raise _UnexpectedError(f"a signature that is none: {error}") from error
    return Signature(call, initial)
