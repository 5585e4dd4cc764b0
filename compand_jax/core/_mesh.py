"""What functions with gathers, scatters and a `custom_vjp` need on a mesh of several devices."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Result = TypeVar("Result")


def sharded_as(*places: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Returns a decorator that lets XLA divide the work of a function over explicit mesh axes.

    There JAX asks every operation for the sharding of its result, and does not know that of a
    gather, a scatter or a reshape. Here each of the function's results has the sharding of the
    argument at its place, and without places all of them are replicated. Where no axis is explicit
    the function is called as it is.

    Args:
      *places: Of positional arguments, one for each result.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def sharded(*args: Any, **static: Any) -> Result:
            arrays = {i: x for i, x in enumerate(args) if isinstance(x, Array)}
            mesh = _mesh_of(*arrays.values())
            if not mesh.explicit_axes:
                return function(*args, **static)

            def call(arrays: dict[int, Array]) -> Result:
                return function(*(arrays.get(i, x) for i, x in enumerate(args)), **static)

            own = [NamedSharding(mesh, jax.typeof(args[place]).sharding.spec) for place in places]
            whole = NamedSharding(mesh, PartitionSpec())
            shardings = tuple(own) if len(own) > 1 else next(iter(own), whole)
            divided: Any = jax.sharding.auto_axes(
                call, axes=mesh.explicit_axes, out_sharding=shardings
            )
            return divided(arrays)

        return sharded

    return decorate


def _mesh_of(*arrays: Array) -> AbstractMesh:
    """Returns the mesh that is set, or the one that the arrays are on; an empty one without."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


@jax.custom_batching.custom_vmap
def replicated(x: Array) -> Array:
    """Returns an array that every device has the whole of, also of an axis that is mapped."""
    return _replicate(x)


@replicated.def_vmap
def _replicated_batch(axis_size: int, batched: list, x: Array) -> tuple[Array, bool]:
    return replicated(x), True


@sharded_as()
def _replicate(x: Array) -> Array:
    return x


def varying_axes(x: Array) -> frozenset:
    """Returns the axes of `jax.shard_map`'s mesh that a value differs along, as JAX tracks it.

    None under `check_vma=False` and under `jax.pmap`, which do not track it.
    """
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def sum_over_mesh(gradient: Array, operand: Array) -> Array:
    """Returns a gradient summed over the mesh axes that it differs along and its operand does not.

    What JAX does for its own functions, and leaves to those with a `custom_vjp`.
    """
    axes = varying_axes(gradient) - varying_axes(operand)
    return lax.psum(gradient, tuple(sorted(axes, key=str))) if axes else gradient
