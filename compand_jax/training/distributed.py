"""Data parallelism over the devices of one process or of many, on one machine or several.

Every process runs the same program on the same data and computes its devices' share of every
batch; XLA adds up the gradients. What is on the disk is written by the main process alone.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def initialize() -> None:
    """Joins the processes of one training, by `jax.distributed`; before any other use of jax.

    Under SLURM, Open MPI, Kubernetes and on TPU pods, jax finds the others by itself. Elsewhere
    the environment says where they are: JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).

    Raises:
      ValueError: it cannot be found out, a number is none, or the others did not come.
    """
    numbers = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text is not None and not text.isdecimal():
            raise ValueError(f"`JAX_{name.upper()}` must be a whole number, got {text!r}: set it")
        numbers[name] = None if text is None else int(text)
    try:
        jax.distributed.initialize(**numbers)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            "`distributed` must find the other processes, got none "
            f"({reason}): start it under SLURM, MPI or on a TPU pod, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def is_main() -> bool:
    """Returns whether this is the process that writes: process 0, or the only one."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process has come to the place of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def data_mesh(devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns a mesh with the axis "data" over the devices, by default all of all processes."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def everywhere(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding that has a copy on each of the mesh's devices."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding that divides a leading axis among the mesh's devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns a copy of the tree on each of the mesh's devices; the tree stays usable.

    Args:
      tree: arrays, PRNG keys among them, that this process has whole, equal in every process.
      mesh: over devices of all processes.
    """
    if jax.process_count() == 1:
        # Copied, because a device_put may be none.
        return jax.device_put(jax.tree.map(jnp.copy, tree), everywhere(mesh))
    is_key = jax.tree.map(
        lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key), tree
    )
    # To jit, what lies on the host is the same in every process.
    host = jax.device_get(
        jax.tree.map(lambda leaf, key: jax.random.key_data(leaf) if key else leaf, tree, is_key)
    )

    def restored(host):
        return jax.tree.map(
            lambda leaf, key: jax.random.wrap_key_data(leaf) if key else jnp.asarray(leaf),
            host,
            is_key,
        )

    return jax.jit(restored, out_shardings=everywhere(mesh))(host)
