"""Checkpoints: whole or not at all, the newest sound one, and none of another model."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util
from tiny_runs import snapshot, tree_bytes

from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.distributed import data_mesh, everywhere
from compand_jax.training.steps import create_state


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "params": {"kernel": jax.random.normal(keys[0], (40, 30)), "bias": jnp.full(3, seed)},
        "half": jnp.full((2, 5), seed, jnp.bfloat16),
        "step": jnp.int32(seed),
        "empty": {},
        "key": keys[1],
    }


@pytest.fixture
def directory(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    path = tmp_path / "checkpoints"
    with Checkpoints(path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), {"of": step})
    return path


def restore(directory, step=None):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: tree(0)), step)


def test_restores_the_newest_bit_for_bit(directory):
    step, found, metadata = restore(directory)
    assert (step, metadata) == (2, {"of": 2})
    assert tree_bytes(found) == tree_bytes(tree(2))
    assert jax.tree.structure(found) == jax.tree.structure(tree(2))
    assert found["half"].dtype == jnp.bfloat16
    assert restore(directory, step=1)[2] == {"of": 1}


def test_leaves_are_named_as_in_flax_state_dicts(directory):
    """So those of every version can be restored, whichever way it found the names."""
    params = {"a": {"kernel": jnp.ones(2)}, "b": [jnp.ones(1), (jnp.ones(3), jnp.ones(4))]}
    tx = optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(0.1)))
    state = create_state({"params": params}, tx, jax.random.key(0))
    names = traverse_util.flatten_dict(serialization.to_state_dict(state), sep="/")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, state)
        assert checkpoints._description(3)["leaves"].keys() == names.keys()
        _, found, _ = checkpoints.restore(state)
    assert tree_bytes(found) == tree_bytes(state)


def test_devices_of_the_save_need_not_be_there(tmp_path):
    mesh = data_mesh()
    replicated = jax.device_put({"w": jnp.ones((4, 4))}, everywhere(mesh))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, replicated)
        found = checkpoints.restore(jax.eval_shape(lambda: replicated))
        assert len(found[1]["w"].devices()) == 1
        assert len(checkpoints.restore(replicated)[1]["w"].devices()) == 8


def test_keeps_the_newest_two(directory):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, tree(3))
        assert checkpoints.steps() == [2, 3]


@pytest.mark.quick
def test_no_checkpoint(tmp_path):
    assert restore(tmp_path / "nowhere") is None
    assert not (tmp_path / "nowhere").exists()


def files_of(directory, step=2):
    return sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def passes_over(directory):
    """Whether the newest is passed over for the one before; else it is whole."""
    with pytest.warns(UserWarning, match="is damaged and passed over") as caught:
        step, found, metadata = restore(directory)
    message = f"the checkpoint of step 2 in {directory} is damaged and passed over: "
    assert [str(w.message).startswith(message) for w in caught] == [True]
    assert "\n" not in str(caught[0].message)
    assert (step, metadata) == (1, {"of": 1})
    assert tree_bytes(found) == tree_bytes(tree(1))


def test_array_with_a_flipped_byte_is_passed_over(directory):
    largest = max(files_of(directory), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 3000  # the kernel
    flip(largest, 0.6)
    passes_over(directory)


@pytest.mark.parametrize("field", ["metadata", "leaves", "checksum"])
def test_changed_description_is_passed_over(directory, field):
    path = directory / "2" / "description" / "metadata"
    described = json.loads(path.read_text())
    changed = {
        "metadata": {"of": 3},
        "leaves": described["leaves"] | {"params/bias": ["int32", [4]]},
        "checksum": described["checksum"] ^ 1,
    }
    path.write_text(json.dumps(described | {field: changed[field]}))
    passes_over(directory)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted"])
def test_every_file_counts_or_does_no_harm(directory, tmp_path, damage):
    """Each file is damaged in turn: what comes back is sound, the newest or the one before."""
    passed = 0
    for path in files_of(directory):
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        victim = copy / path.relative_to(directory)
        data = victim.read_bytes()
        if damage == "deleted":
            victim.unlink()
        else:
            victim.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            step, found, metadata = restore(copy)
        assert len(warned) == (step == 1)
        assert metadata == {"of": step}
        assert tree_bytes(found) == tree_bytes(tree(step))
        passed += step == 1
        shutil.rmtree(copy)
    assert passed >= 3


def test_unsealed_checkpoint_has_the_checksum_of_its_tree(directory):
    """As a kill between the two leaves it."""
    (directory / "2" / "files.json").unlink()
    assert restore(directory)[0] == 2
    path = directory / "2" / "description" / "metadata"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"checksum": described["checksum"] ^ 1}))
    passes_over(directory)


def test_directory_half_written(directory):
    shutil.rmtree(directory / "2" / "state")
    passes_over(directory)
    shutil.rmtree(directory / "2")
    (directory / "2").mkdir()
    passes_over(directory)


def test_unfinished_save_is_no_checkpoint(directory):
    (directory / "3.orbax-checkpoint-tmp-0").mkdir()
    assert restore(directory)[0] == 2
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, tree(3))
        assert checkpoints.steps() == [2, 3]
    assert restore(directory)[0] == 3


def test_all_damaged(directory):
    for step in (1, 2):
        (directory / str(step) / "description" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="damaged and passed over") as caught:
        assert restore(directory) is None
    assert len(caught) == 2


def test_a_new_save_replaces_damaged_ones(directory):
    (directory / "2" / "description" / "metadata").write_text("{")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, tree(5), {"of": 5})
    step, found, metadata = restore(directory)
    assert (step, metadata) == (2, {"of": 5})
    assert tree_bytes(found) == tree_bytes(tree(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half": jnp.zeros((2, 6), jnp.bfloat16)}, r"half bfloat16\[2, 6\], got bfloat16\[2, 5\]"),
        ({"half": jnp.zeros((2, 5))}, r"half float32\[2, 5\], got bfloat16\[2, 5\]"),
        ({"more": jnp.zeros(1)}, r"more float32\[1\], got absent"),
        ({"params": {}}, r"params/bias absent, got int32\[3\]"),
    ],
)
def test_checkpoint_of_another_model(directory, change, message):
    before = snapshot(directory)
    with Checkpoints(directory) as checkpoints:
        match = f"the checkpoint of step 2 in .* must be one of this model, with {message}: choose"
        with pytest.raises(ValueError, match=match):
            checkpoints.restore({**tree(0), **change})
    assert snapshot(directory) == before


@pytest.mark.quick
def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    message = "the checkpoint of step 1 could not be written to .*: free some space, or choose"
    with (
        Checkpoints(tmp_path / "file" / "below") as checkpoints,
        pytest.raises(OSError, match=message),
    ):
        checkpoints.save(1, {"w": np.ones(2)})
    assert (tmp_path / "file").read_text() == "kept"


def test_full_disk_keeps_the_checkpoints_before(directory, monkeypatch):
    with Checkpoints(directory) as checkpoints:
        manager = checkpoints._open()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(manager), "save", full)
        with pytest.raises(OSError, match="step 3 could not be written to .*No space left") as info:
            checkpoints.save(3, tree(3))
        assert "\n" not in str(info.value)
    assert restore(directory)[0] == 2
