"""Checkpoints of any pytree of arrays, kept by orbax: restored whole, or passed over as damaged.

Orbax writes and reads the arrays, of one process or of many. What it lacks is added: it does not
notice every changed byte and fails noisily, later, on some, so each checkpoint has checksums of the
tree and of every file; and it does not say what another model has, so leaves are described.
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
from jax.sharding import SingleDeviceSharding

from compand_jax.data.packages import needed_for
from compand_jax.training.distributed import is_main, wait_for_all

with needed_for("checkpoints", "orbax-checkpoint"):
    import orbax.checkpoint as ocp

Tree = Any
_MAX_TO_KEEP = 2
_SEAL = "files.json"


class Checkpoints:
    """The checkpoints of one training in one directory: the newest two are kept.

    Use it as a context manager, or call `close`. What is in the directory already is kept. Of many
    processes all save and all restore, in a directory that all of them see: a checkpoint is the
    same for any number of processes.

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
        named = _named(tree)
        described = {
            "metadata": metadata or {},
            "leaves": _described(named),
            "checksum": _checksum(named),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(named), description=ocp.args.JsonSave(described)
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            manager = self._open()
            for damaged in [other for other in manager.all_steps() if other >= step]:
                manager.delete(damaged)
            manager.save(step, args=args, force=True)
            manager.wait_until_finished()
            if is_main():
                self._seal(step)
        except Exception as error:  # tensorstore raises what it likes on a full disk
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: "
                f"{_first_line(error)}: free some space, or choose a writable `run_dir`"
            ) from error
        wait_for_all(f"checkpoint {step} in {self.directory}")

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
        wanted = _named(target)
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                self._check_seal(candidate)
                described = self._description(candidate)
                if described["leaves"] == _described(wanted):
                    named = self._read(candidate, wanted, described["checksum"])
                    return candidate, _like(target, named), described["metadata"]
            except Exception as error:  # damaged files raise anything: try the one before
                warnings.warn(
                    f"the checkpoint of step {candidate} in {self.directory} is damaged and "
                    f"passed over: {_first_line(error)}",
                    stacklevel=2,
                )
            else:
                self._refuse(candidate, described["leaves"], _described(wanted))
        return None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_MAX_TO_KEEP, create=False, cleanup_tmp_directories=True
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
        path = self.directory / str(step) / _SEAL
        if not path.is_file():  # killed before it was written: the tree's checksum has to do
            return
        found = _file_checksums(path.parent)
        for name, checksum in json.loads(path.read_text()).items():
            if found.get(name) != checksum:
                raise OSError(f"{name} is {'changed' if name in found else 'missing'}")

    def _read(self, step: int, wanted: dict[str, Any], checksum: int) -> dict[str, Any]:
        args = ocp.args.StandardRestore({name: _abstract(leaf) for name, leaf in wanted.items()})
        named = self._open().restore(step, args=ocp.args.Composite(state=args))["state"]
        if _checksum(named) != checksum:
            raise OSError("its checksum is wrong")
        return named

    def _refuse(self, step: int, found: dict, wanted: dict) -> None:
        names = sorted(found.keys() | wanted.keys())
        name = next(name for name in names if found.get(name) != wanted.get(name))
        raise ValueError(
            f"the checkpoint of step {step} in {self.directory} must be one of this model, with "
            f"{name} {_shown(wanted.get(name))}, got {_shown(found.get(name))}: choose another "
            "directory or model"
        )


def _shown(leaf: list | None) -> str:
    return "absent" if leaf is None else f"{leaf[0]}{leaf[1]}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _named(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by their paths, PRNG keys as their numbers."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): _raw(leaf) if _is_key(leaf) else leaf for path, leaf in pairs}


def _like(target: Tree, named: dict[str, Any]) -> Tree:
    """Returns the leaves in the structure that `_named` took them from."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.random.wrap_key_data(named[_name(path)]) if _is_key(leaf) else named[_name(path)]
        ),
        target,
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, key)
    return jax.random.key_data(key)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    # Never left to what was saved: that names the devices of then.
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _described(named: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named.items()}


def _file_checksums(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): zlib.crc32(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (path.parent != directory or path.stem != Path(_SEAL).stem)
    }


def _checksum(named: dict[str, Any]) -> int:
    total = 0
    for name in sorted(named):
        total = zlib.crc32(np.ascontiguousarray(jax.device_get(named[name])).tobytes(), total)
    return total
