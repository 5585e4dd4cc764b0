"""Values of a traced program that are a parameter: moved, cut or cast, and not computed with.

A parameter may be transposed, reshaped, sliced or converted before it is multiplied. Each axis of
such a view runs along axes of the parameter, and they tell which of those a contraction sums over.
"""

import dataclasses
import itertools
import math
from typing import Any

# What gives each axis of the operand to the same axis of the result, perhaps in part.
_SAME_AXES = frozenset(
    (
        "slice", "dynamic_slice", "split", "rev", "convert_element_type", "reduce_precision",
        "copy", "copy_p", "stop_gradient", "name", "sharding_constraint", "reshard",
        "pvary",
    )
)  # fmt: skip

Axes = tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True)
class View:
    """What is known of a value that is a view of a parameter.

    Attributes:
      path: the parameter's; None where its layer has quantized it already.
      axes: for each axis of the value, those of the parameter that it runs along.
      whole: whether it is the parameter as it is stored, or a stack's layer of it.
    """

    path: str | None
    axes: Axes
    whole: bool = False

    def layer(self) -> "View":
        """Returns the view of one layer of a stack, as `jax.lax.scan` hands it to its body."""
        return dataclasses.replace(self, axes=self.axes[1:])


def view_of(path: str, ndim: int) -> View:
    """Returns the view that a parameter is of itself."""
    return View(path, tuple(frozenset([axis]) for axis in range(ndim)), whole=True)


def moved(equation: Any, view: View) -> tuple[View, ...] | None:
    """Returns the views that an equation makes of its first operand; None if it computes."""
    name, operand = equation.primitive.name, equation.invars[0].aval
    views = []
    for result in equation.outvars:
        if name in _SAME_AXES and result.aval.ndim == operand.ndim:
            axes = view.axes
        elif name == "transpose":
            axes = tuple(view.axes[axis] for axis in equation.params["permutation"])
        elif name == "broadcast_in_dim":
            axes = _broadcast(view.axes, operand.shape, equation.params)
        elif name in ("reshape", "squeeze", "expand_dims"):
            axes = regrouped(view.axes, operand.shape, result.aval.shape)
        else:
            return None
        views.append(View(view.path, axes))
    return tuple(views)


def _broadcast(axes: Axes, shape: tuple[int, ...], params: Any) -> Axes:
    result = [frozenset[int]()] * len(params["shape"])
    for axis, size, place in zip(axes, shape, params["broadcast_dimensions"], strict=True):
        if size == params["shape"][place]:
            result[place] = axis
    return tuple(result)


def regrouped(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """Returns the axes after a reshape: all of a run's for each axis of the run of the same size.

    >>> d, n, h = (frozenset([axis]) for axis in range(3))
    >>> regrouped((d, n, h), (5, 2, 3), (5, 6)) == (d, n | h)
    True
    """
    if math.prod(old) == 0:
        return (frozenset().union(*axes),) * len(new)
    result = [frozenset[int]()] * len(new)
    olds = iter([i for i, size in enumerate(old) if size != 1])
    news = iter([i for i, size in enumerate(new) if size != 1])
    for first in olds:
        run, places = [first], [next(news)]
        while (left := math.prod(old[i] for i in run)) != (
            right := math.prod(new[i] for i in places)
        ):
            if left < right:
                run.append(next(olds))
            else:
                places.append(next(news))
        along = frozenset(itertools.chain.from_iterable(axes[i] for i in run))
        for place in places:
            result[place] = along
    return tuple(result)
