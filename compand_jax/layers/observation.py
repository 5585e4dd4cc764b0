"""What a visitor of layers is told of one, and the visitor that records what it sees."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from compand_jax.calibration.samples import Histogram, merge_histograms
from compand_jax.core._mesh import replicated
from compand_jax.layers.unrolling import Unrolling


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a visitor is told about a layer.

    Attributes:
      site: its name.
      channel_axes: the weight's output axes, from the end.
      unrolling: how it is a matrix product, or None where it is not known to be one.
      mixed_axis: an axis of the weight that is an output and is summed over as well, or None.
      input_axes: the weight's axes that groups of inputs run along, from the end: axes that are
        summed over, one behind the other. () where there are none.
    """

    site: str
    channel_axes: tuple[int, ...]
    unrolling: Unrolling | None = None
    mixed_axis: int | None = None
    input_axes: tuple[int, ...] = ()


class Observer:
    """A visitor that changes nothing and records, per site, what is computed from its tensors.

    Args:
      activation: Called with an activation; what it returns (a tree of arrays) is recorded.
      weight: Called with a weight, likewise.
      moments: Called with a layer, its input and its weight's shape, likewise; None is not
        recorded.
      at_output: Whether a site's activation is its output, instead of its input.
      calls_back: Whether every inner trace runs, so that its values may call back at once.

    Values of the trace that the observer was made in are kept as they are, in `traced`, for the
    function that it is in to return. Inside scan, vmap and remat they belong to an inner trace:
    they go through a callback to `called_back`, as host arrays, complete after
    `jax.effects_barrier()`. Only `observe_layers` knows which of the inner traces are run.
    """

    def __init__(
        self,
        *,
        activation: Callable[[Array], Any] | None = None,
        weight: Callable[[Array], Any] | None = None,
        moments: Callable[[Layer, Array, tuple[int, ...]], Any] | None = None,
        at_output: bool = False,
        calls_back: bool = False,
    ) -> None:
        self.calls_back = calls_back
        self._functions = {"activation": activation, "weight": weight}
        self._moments = moments
        self._at_output = at_output
        self._trace = current_trace()
        self.layers: dict[str, Layer] = {}
        self.weight_shapes: dict[str, tuple[int, ...]] = {}
        self.activations: set[str] = set()
        self.last_site: str | None = None
        self.complex: dict[str, dict[str, Any]] = {}  # types of what is not recorded, by operand
        kinds = ("activation", "weight", "moments")
        self.traced: dict[str, dict[str, list]] = {kind: {} for kind in kinds}
        self.called_back: dict[str, dict[str, list]] = {kind: {} for kind in kinds}
        # Inner traces' values in the order that they come in: those that call back, by name, or
        # None where each is marked by its name instead.
        self.run_names: frozenset[str] | None = None
        self._inner_names = map("compand_jax value {}".format, itertools.count())

    def operands(
        self, layer: Layer, activation: Array | None, weight: Array
    ) -> tuple[Array | None, Array]:
        """Records the layer, its weight and, unless it is taken at the output, its input."""
        self.weight(layer, weight)
        if activation is not None:
            self.activation(layer, activation)
        return activation, weight

    def weight(self, layer: Layer, weight: Array) -> Array:
        """Records the layer and its weight."""
        self._note(layer)
        self.weight_shapes.setdefault(layer.site, weight.shape)
        self._compute("weight", layer.site, weight)
        return weight

    def activation(self, layer: Layer, activation: Array) -> Array:
        """Records the layer and, unless it is taken at the output, its input."""
        self._note(layer)
        if not self._at_output:
            self._compute("activation", layer.site, activation)
        shape = self.weight_shapes.get(layer.site)
        if self._moments and shape is not None and layer.site not in self.complex:
            self._record("moments", layer.site, self._moments(layer, activation, shape))
        return activation

    def _note(self, layer: Layer) -> None:
        self.layers.setdefault(layer.site, layer)
        self.last_site = layer.site

    def output(self, layer: Layer, output: Array) -> Array:
        """Records the layer's output, where activations are taken there."""
        if self._at_output:
            self._compute("activation", layer.site, output)
        return output

    def values(self, what: str, site: str) -> list:
        """Returns what was recorded of a site's "activation", "weight" or "moments"."""
        return self.traced[what].get(site, []) + self.called_back[what].get(site, [])

    def _compute(self, what: str, site: str, x: Array) -> None:
        if what == "activation":
            self.activations.add(site)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            self.complex.setdefault(site, {})["act" if what == "activation" else what] = x.dtype
            return
        if (function := self._functions[what]) is not None:
            self._record(what, site, function(x))

    def _record(self, what: str, site: str, value: Any) -> None:
        if value is None:
            return
        if current_trace() == self._trace:
            values = self.traced[what].setdefault(site, [])
            if what == "weight":  # the same in every call, but that WeightNorm's init has a raw one
                values.clear()
            values.append(value)
            return
        name, values = next(self._inner_names), self.called_back[what].setdefault(site, [])
        if self.calls_back or name in (self.run_names or ()):
            # Under vmap it is called for one example after the other, who have to be at hand.
            whole = jax.tree.map(replicated, value)
            jax.debug.callback(lambda tree: values.append(jax.tree.map(np.asarray, tree)), whole)
        elif self.run_names is None:
            checkpoint_name(jax.tree.leaves(value)[0], name)


@dataclasses.dataclass
class Observations:
    """What was seen of a model.

    Attributes:
      owner: the name of the argument that its weights came from, for errors.
      observers: what saw it, one for each trace.
      weights: by site, as they are used: one, or those of a stack of layers.
      activations: by site, their histogram.
      moments: by site, the second moments of a layer's inputs, [groups, n, n], where asked for.
    """

    owner: str = "variables"
    observers: list[Observer] = dataclasses.field(default_factory=list)
    weights: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    activations: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    moments: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def layer(self, site: str) -> Layer:
        """Returns what was told of a site."""
        return next(seen.layers[site] for seen in self.observers if site in seen.layers)

    def unrolled(self, site: str) -> Unrolling | None:
        """Returns how a site is a product with inputs whose moments are known, or None."""
        if site not in self.moments or len(self.weights[site]) != 1:
            return None  # the moments of a stack's layers cannot be told apart
        if not np.all(np.isfinite(self.moments[site])) or not np.any(self.moments[site]):
            return None  # then no change of the weight is better than another
        return self.observers[0].layers[site].unrolling

    def add(self, traced: dict[str, dict[str, list]], batch: int) -> None:
        """Takes over a batch, by number: what the observed function returned and called back.

        Raises:
          ValueError: a weight or an activation is not finite.
        """
        for observer in self.observers:
            for what, sites in observer.called_back.items():
                for site, values in sites.items():
                    traced[what].setdefault(site, []).extend(values)
                    values.clear()
        for site, values in traced["weight"].items():
            if not self.weights.get(site):  # the same in every batch
                self.weights[site] = [np.asarray(value) for value in values]
                if not all(np.all(np.isfinite(weight)) for weight in self.weights[site]):
                    raise ValueError(
                        f"`{self.owner}` must be finite, the weight of site {site!r} is not: give "
                        "what there was before training diverged"
                    )
        for site, values in traced["activation"].items():
            for value in values:
                value = Histogram(*(np.asarray(leaf, np.float64) for leaf in value))
                if not np.isfinite([value.maximum, value.minimum]).all():
                    raise ValueError(
                        f"`batches` must give finite activations, got NaN or infinity at site "
                        f"{site!r} in batch {batch}, counting from 0: leave it out"
                    )
                seen = self.activations.get(site)
                self.activations[site] = value if seen is None else merge_histograms(seen, value)
        for site, values in traced["moments"].items():
            if not values:  # a branch that this batch did not take
                continue
            parts = [np.asarray(value) for value in values]
            seen = self.moments.get(site)
            self.moments[site] = sum(parts[1:], parts[0]) + (0 if seen is None else seen)
