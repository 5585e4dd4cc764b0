"""Checkpoints of any pytree of arrays, kept by orbax: saved whole, restored whole or not at all.

A checkpoint holds the tree, its leaves' shapes and types, metadata of the caller's, and checksums
of the tree and of every file. So a damaged one is told from a sound one, and one of another model
from a damaged one.
"""

import json
import logging
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from jax.sharding import SingleDeviceSharding

from compand_jax.data.packages import needed_for
from compand_jax.training.distributed import is_main, wait_for_all

with needed_for("checkpoints", "orbax-checkpoint"):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.options import MultiprocessingOptions

Tree = Any
_MAX_TO_KEEP = 2
_SEPARATOR = "/"
_SEAL = "files.json"


class Checkpoints:
    """The checkpoints of one training in one directory: the newest two are kept.

    Use it as a context manager, or call `close`. What is in the directory already is kept. Of many
    processes, all save, which the main one does for all, and each restores for itself, from a
    directory that all of them see: a checkpoint is the same for any number of processes.

    Args:
      directory: made at the first `save`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
    ...     checkpoints.save(3, {"w": jnp.ones(2)}, {"note": "sound"})
    ...     step, tree, metadata = checkpoints.restore({"w": jnp.zeros(2)})
    >>> step, tree["w"].tolist(), metadata["note"]
    (3, [1.0, 1.0], 'sound')
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        self._manager: ocp.CheckpointManager | None = None
        logging.getLogger("absl").setLevel(logging.ERROR)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is being written, and releases orbax's threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def steps(self) -> list[int]:
        """Returns the steps there are checkpoints of, in ascending order; none need be sound."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, tree: Tree, metadata: dict | None = None) -> None:
        """Writes a checkpoint, and returns when it is complete.

        Args:
          step: names it; larger than that of every sound checkpoint there. Others, which were
            passed over as damaged, are deleted.
          tree: a pytree of arrays, PRNG keys among them; each process has the whole of it.
          metadata: anything that JSON can hold.

        Raises:
          OSError: if it cannot be written; the checkpoints before it stay.
        """
        if is_main():
            self._write(step, tree, metadata)
        wait_for_all(f"checkpoint {step} in {self.directory}")

    def _write(self, step: int, tree: Tree, metadata: dict | None) -> None:
        flat = _flatten(tree)
        if jax.process_count() > 1:
            flat = jax.device_get(flat)  # orbax would wait for the others
        described = {
            "metadata": metadata or {},
            "leaves": _describe(flat),
            "checksum": _checksum(flat),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(flat), description=ocp.args.JsonSave(described)
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            manager = self._open()
            for damaged in [other for other in manager.all_steps() if other >= step]:
                manager.delete(damaged)
            manager.save(step, args=args, force=True)
            manager.wait_until_finished()
            self._seal(step)
        except Exception as error:  # tensorstore raises what it likes on a full disk
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: "
                f"{_first_line(error)}: free some space, or choose a writable `run_dir`"
            ) from error

    def restore(self, target: Tree, step: int | None = None) -> tuple[int, Tree, dict] | None:
        """Returns the newest sound checkpoint, warning of every one that is passed over.

        Args:
          target: a pytree of arrays or shapes with the structure to restore; the result has its
            structure, shapes, types, and shardings; without any it is on one device.
          step: only this one is tried; None tries all, the newest first.

        Returns:
          The step, the tree and the metadata; None if there is no sound checkpoint.

        Raises:
          ValueError: if the checkpoint is one of another model.
        """
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                self._check_seal(candidate)
                described = self._description(candidate)
            except Exception as error:  # damaged files raise anything: try the one before
                self._warn(candidate, error)
                continue
            self._check_leaves(candidate, described["leaves"], _describe(_flatten(target)))
            flat = self._read_sound(candidate, target, described["checksum"])
            if flat is not None:
                return candidate, _unflatten(flat, target), described["metadata"]
        return None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_MAX_TO_KEEP,
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=_alone(),
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _description(self, step: int) -> dict:
        path = self.directory / str(step) / "description" / "metadata"
        described = json.loads(path.read_text())
        return {key: described[key] for key in ("metadata", "leaves", "checksum")}

    def _seal(self, step: int) -> None:
        path = self.directory / str(step) / _SEAL
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_file_checksums(path.parent)))
        os.replace(partial, path)

    def _check_seal(self, step: int) -> None:
        """Raises where a file is not as it was; orbax would read on, and fail noisily, later."""
        path = self.directory / str(step) / _SEAL
        if not path.is_file():  # killed before it was written: the tree's checksum has to do
            return
        found = _file_checksums(path.parent)
        for name, checksum in json.loads(path.read_text()).items():
            if found.get(name) != checksum:
                raise OSError(f"{name} is {'changed' if name in found else 'missing'}")

    def _read_sound(self, step: int, target: Tree, checksum: int) -> dict | None:
        try:
            flat = self._read(step, target)
            if _checksum(flat) != checksum:
                raise OSError("its checksum is wrong")
            return flat
        except Exception as error:  # likewise, of the arrays
            self._warn(step, error)
            return None

    def _read(self, step: int, target: Tree) -> dict:
        abstract = jax.tree.map(_abstract, _flatten(target))
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            return checkpointer.restore(self.directory / str(step) / "state", abstract)

    def _warn(self, step: int, error: Exception) -> None:
        warnings.warn(
            f"the checkpoint of step {step} in {self.directory} is damaged and passed over: "
            f"{_first_line(error)}",
            stacklevel=4,
        )

    def _check_leaves(self, step: int, found: dict, wanted: dict) -> None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"the checkpoint of step {step} in {self.directory} must be one of this "
                    f"model, with {name} {_shown(wanted.get(name))}, got "
                    f"{_shown(found.get(name))}: choose another directory or model"
                )


def _alone() -> MultiprocessingOptions:
    """Returns the option that makes orbax wait for no other process."""
    if jax.process_count() == 1:
        return MultiprocessingOptions()
    own = jax.process_index()
    return MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def _shown(leaf: list | None) -> str:
    return "absent" if leaf is None else f"{leaf[0]}{leaf[1]}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    # Keys are stored as their uint32 data, which every version of orbax can write.
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _flatten(tree: Tree) -> dict[str, Any]:
    state = traverse_util.flatten_dict(serialization.to_state_dict(tree), sep=_SEPARATOR)
    return {name: _raw(leaf) for name, leaf in state.items()}


def _unflatten(flat: dict[str, Any], target: Tree) -> Tree:
    # Empty nodes are not stored: they come from the target.
    state = traverse_util.flatten_dict(
        serialization.to_state_dict(target), keep_empty_nodes=True, sep=_SEPARATOR
    )
    for name, leaf in flat.items():
        if _is_key(state[name]):
            leaf = jax.random.wrap_key_data(leaf)
        state[name] = leaf
    return serialization.from_state_dict(
        target, traverse_util.unflatten_dict(state, sep=_SEPARATOR)
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    # Never left to what was saved: that names the devices of then.
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(flat: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in flat.items()}


def _file_checksums(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): zlib.crc32(path.read_bytes())
        for path in files
        if path.parent != directory or path.stem != Path(_SEAL).stem
    }


def _checksum(flat: dict[str, Any]) -> int:
    # The disk's own checks do not cover every byte of an array.
    total = 0
    for name in sorted(flat):
        total = zlib.crc32(np.ascontiguousarray(jax.device_get(flat[name])).tobytes(), total)
    return total
