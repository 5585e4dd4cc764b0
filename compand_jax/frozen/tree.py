"""What a frozen model consists of: static facts by site, and arrays by name."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compand_jax.core.spec import check_spec
from compand_jax.layers.parametrization import set_leaf

Path = tuple[str, ...]
"""Where a variable is: its collection, its modules, its name."""


@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """A site's weight as codes.

    Args:
      bits: Bits per code.
      grid: "midtread" or "midrise": 2^bits - 1 or 2^bits levels.
      shape: Of the codes: the weight's, stacked as scan or vmap stack it.
      dtype: Of the weight that the layer multiplies.
      scale_shape: Of what the table's levels are multiplied with: () for nothing, else the
        weight's shape, with 1 along the axes that share a scale; (r, 1, b) with groups.
      leaf: The variable that is left out, its path joined by `join_path`; None where none is.
      leaf_shape: Of that variable, where the weight is computed from it (WeightNorm); None where
        the codes take its place.
      leaf_dtype: Likewise.
      norm: Path of the batch norm that is folded into the weight, if one is, as `leaf`'s.
      group_size: How many inputs share a scale, g: the weight is [r, g, b] for its scales. None
        where the scales are of the weight's own shape.
      scale_dtype: What the scales are stored in: "float32", "float16", or "uint8", multiples of
        one unit.
    """

    bits: int
    grid: str
    shape: tuple[int, ...]
    dtype: str
    scale_shape: tuple[int, ...]
    leaf: str | None
    leaf_shape: tuple[int, ...] | None = None
    leaf_dtype: str | None = None
    norm: str | None = None
    group_size: int | None = None
    scale_dtype: str = "float32"

    @property
    def computed(self) -> bool:
        """Whether the weight does not come from the place of a variable."""
        return self.leaf is None or self.leaf_shape is not None

    @property
    def scales_fit(self) -> bool:
        """Whether the scales are of a shape that goes with the codes'."""
        scales, size = self.scale_shape, self.group_size
        if size is not None:
            own = size * math.prod(scales)
            whole = self.size == own or (own > 0 and self.size % own == 0)
            return len(scales) == 3 and scales[1] == 1 and whole
        if not scales:
            return self.scale_dtype == "float32"
        stacked = len(self.shape) - len(scales)
        pairs = zip(scales, self.shape[max(stacked, 0) :], strict=False)
        return stacked >= 0 and all(n in (1, own) for n, own in pairs)

    @property
    def size(self) -> int:
        """How many codes there are."""
        return math.prod(self.shape)

    @property
    def levels(self) -> int:
        """How many levels a table has."""
        spec = check_spec(self.bits, True, self.grid)
        return 2 * spec.steps + (not spec.midrise)


@dataclasses.dataclass(frozen=True)
class FrozenSite:
    """A site: its weight, and its activations' bits and sign; None where in full precision."""

    weight: FrozenWeight | None = None
    act_bits: int | None = None
    act_signed: bool = True


Arrays = dict[str, dict[str, Any]]
"""The arrays of a frozen model, by kind and name.

    codes           site -> uint8 [bytes], packed
    levels          site -> float32 [levels], ascending
    scales          site -> what the levels are multiplied with, as `scale_shape` says
    scale_units     site -> float32, what scales of uint8 are multiples of
    shifts          site -> float32 [features], what is left of a folded batch norm
    act_levels      site -> float32 [levels], ascending
    act_thresholds  site -> float32 [levels - 1], between them
    variables       path -> what stays in full precision, the path joined by `join_path`

Where each layer of a stack has its own, as in NNX, its axes are in front of levels, scales,
scale_units, act_levels and act_thresholds; codes are those of the whole stack.
"""

TYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "uint8", "bool")
"""What variables may be to be saved; a file holds the floats as float32."""

WEIGHT_TYPES = TYPES[:3]

KINDS = (
    "codes", "levels", "scales", "scale_units", "shifts", "act_levels", "act_thresholds",
    "variables",
)  # fmt: skip


def join_path(path: Path) -> str:
    """Returns a path as one name, as JSON pointers do; `split_path` is the inverse.

    >>> join_path(("params", "a/b", "bias"))
    'params/a~1b/bias'
    """
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)


def split_path(name: str) -> Path:
    """Returns the path that `join_path` joined."""
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def flatten(tree: Mapping, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields the path and value of every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def nested(items: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Returns the tree that `flatten` flattened."""
    tree: dict[str, Any] = {}
    for path, value in items:
        set_leaf(tree, path, value)
    return tree
