"""Whole runs, of the tiny network."""

import json
import shutil

import jax
import numpy as np
import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from tiny_runs import (
    replace,
    rows_without_time,
    snapshot,
    standard_promotion,  # noqa: F401
    tiny,  # noqa: F401
    tiny_config,
    tiny_data,
    tree_bytes,
    use_tiny,
)

from compand_jax import QuantConfig, Rule, import_state_dict
from compand_jax.data.images import ImageData
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs import stages
from compand_jax.experiments.runs.config import (
    CONTROL,
    FULL_PRECISION,
    METHODS_BY_NAME,
    Method,
    to_json,
)
from compand_jax.experiments.runs.directory import read_config, read_results
from compand_jax.experiments.runs.run import evaluate_stage, run
from compand_jax.experiments.runs.stages import finished
from compand_jax.layers.model_size import model_bytes
from compand_jax.models import create_model
from compand_jax.training import fit as training
from compand_jax.training.metrics_log import read_log

UNIFORM = Method("uniform")
STAGES = (FULL_PRECISION, *METHODS_BY_NAME)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of all methods: its configuration and its table."""
    path = tmp_path_factory.mktemp("whole")
    config = tiny_config(path / "run", record_dir=path / "record")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        return config, run(config, progress=False)


@pytest.fixture
def copied(whole, tmp_path, tiny):  # noqa: F811
    """A configuration to go on with from a copy of the full-precision stage."""
    config = whole[0]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copyfile(config.run_dir / "config.json", run_dir / "config.json")
    shutil.copytree(config.run_dir / FULL_PRECISION, run_dir / FULL_PRECISION)
    return replace(config, run_dir=run_dir, record_dir=None, methods=(UNIFORM,))


def results_of(config):
    return {result["stage"]: result for result in read_results(config.run_dir)}


def test_run_has_what_was_promised(whole):
    config, table = whole
    assert read_config(config.run_dir) == config
    results = results_of(config)
    assert list(results) == list(STAGES)
    assert (config.run_dir / "results.md").read_text().find(table) > 0
    assert (config.run_dir / "plot.png").is_file()
    for name in STAGES:
        with stages.Checkpoints(config.run_dir / name / "checkpoints") as checkpoints:
            assert checkpoints.steps() == ([4, 8] if name == FULL_PRECISION else [4])
    assert [results[name]["steps"] for name in STAGES] == [8, 4, 4, 4, 4, 4]
    recorded = json.loads((config.record_dir / "results.json").read_text())
    assert recorded[2]["difference"] == pytest.approx(
        results["uniform"]["test_accuracy"] - results[CONTROL.name]["test_accuracy"]
    )
    for result in results.values():
        assert result["config"] == json.loads(json.dumps(to_json(config)))
        assert {"seed", "versions", "devices", "date"} <= result.keys()


def test_metrics_hold_loss_accuracy_and_every_mu_and_scale(whole):
    config = whole[0]
    for name in STAGES:
        rows = read_log(config.run_dir / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(2, 2 * len(rows) + 1, 2))
        assert all({"loss", "accuracy", "epoch", "learning_rate"} <= row.keys() for row in rows)
        if name in (FULL_PRECISION, CONTROL.name):
            assert "quantizers" not in rows[0]
            continue
        result = results_of(config)[name]
        assert rows[-1]["quantizers"] == result["quantizers"]
        for site in ("conv", "dense"):
            values = rows[-1]["quantizers"][site]
            assert set(values) == {"weight_mu", "weight_scale", "act_mu", "act_scale"}
        mus = {
            values[f"{kind}_mu"]
            for values in rows[-1]["quantizers"].values()
            for kind in ("weight", "act")
        }
        assert (
            len(mus)
            == {"uniform": 1, "single": 1, "separate": 2, "per_layer": 4}[
                name.partition("-")[2] or name
            ]
        )


def test_evaluation_from_the_checkpoint_equals_the_result(whole, tiny):  # noqa: F811
    config = whole[0]
    for name, result in results_of(config).items():
        assert evaluate_stage(config, tiny, name) == (result["correct"], result["total"])
        assert result["test_accuracy"] == 100 * result["correct"] / 19


def test_model_size_counts_packed_weights_and_every_mu(whole, tiny):  # noqa: F811
    config = whole[0]
    stage, state = finished(config, tiny, "mu_law-per_layer")
    # conv 3x3x1x4 and dense 64x3 at 4 bits; 4 biases and statistics each of the norm, 3 of the
    # dense layer, 4 mu and 4 scales at 4 bytes.
    packed = (36 + 192) // 2
    expected = packed + 4 * (4 * 4 + 3) + 4 * 8
    assert model_bytes(state.variables, stage.model.sites) == expected
    assert results_of(config)["mu_law-per_layer"]["model_bytes"] == expected
    assert results_of(config)[FULL_PRECISION]["model_bytes"] == 4 * (36 + 192 + 19)


def test_finished_run_is_not_run_again(whole, tiny):  # noqa: F811
    config, table = whole
    before = snapshot(config.run_dir)
    assert run(config, progress=False) == table
    assert snapshot(config.run_dir) == before


def test_damaged_end_of_full_precision_is_an_error_and_can_be_repeated(copied):
    directory = copied.run_dir / FULL_PRECISION
    (directory / "checkpoints" / "8" / "description" / "metadata").write_text("{")
    with (
        pytest.warns(UserWarning, match="checkpoint of step 8 .* is damaged and passed over"),
        pytest.raises(
            UserError,
            match="`run_dir` must have a sound checkpoint of step 8 in .* got one of step 4: "
            "delete .*result.json and run compand train again",
        ),
    ):
        run(copied, progress=False)
    assert not (copied.run_dir / "uniform").exists()
    old = json.loads((directory / "result.json").read_text())
    rows = rows_without_time(read_log(directory / "metrics.jsonl"))
    (directory / "result.json").unlink()
    with pytest.warns(UserWarning, match="damaged and passed over"):
        run(replace(copied, methods=()), progress=False)
    new = json.loads((directory / "result.json").read_text())
    assert new["correct"] == old["correct"]
    assert rows_without_time(read_log(directory / "metrics.jsonl")) == rows


def test_all_damaged(copied):
    shutil.rmtree(copied.run_dir / FULL_PRECISION / "checkpoints")
    with pytest.raises(UserError, match="must have a sound checkpoint .* got none"):
        run(copied, progress=False)
    with pytest.raises(UserError, match="must have a sound checkpoint .* got none"):
        evaluate_stage(copied, tiny_data(), FULL_PRECISION)


def test_divergence_loses_nothing_of_the_finished_stages(copied):
    before = snapshot(copied.run_dir / FULL_PRECISION)
    config = replace(copied, finetune_learning_rate=1e38, methods=(CONTROL,))
    with pytest.raises(UserError, match=r"got a NaN or infinite (loss at|parameters)"):
        run(config, progress=False)
    assert snapshot(copied.run_dir / FULL_PRECISION) == before
    assert not (copied.run_dir / CONTROL.name / "result.json").exists()


def test_full_disk_during_the_run(copied, monkeypatch):
    before = snapshot(copied.run_dir / FULL_PRECISION)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "append_log", full)
    message = "`run_dir` must stay writable, got .*run .*No space left on device.*: free some space"
    with pytest.raises(UserError, match=message):
        run(copied, progress=False)
    assert snapshot(copied.run_dir / FULL_PRECISION) == before


def test_seed_decides_the_parameters(copied, whole):
    """The uniform stage anew is bit for bit the same; of another seed it is another."""
    run(copied, progress=False)
    data = tiny_data()
    again = finished(copied, data, "uniform")[1]
    assert tree_bytes(again) == tree_bytes(finished(whole[0], data, "uniform")[1])
    keys = stages._keys(copied.seed)
    other = stages._keys(1)
    for key, another in zip(keys, other, strict=True):
        assert np.any(jax.random.key_data(key) != jax.random.key_data(another))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 72}, "`batch_size` must be at most the 64 images of the training split"),
        ({"batch_size": 12}, "`batch_size` must be a multiple of the 8 devices, got 12"),
        (
            {"quant": QuantConfig(rules=(Rule("cnov"),))},
            "`rules` must each match a site, 'cnov' matches none of 'conv', 'dense'",
        ),
    ],
)
def test_nothing_is_made_after_an_error(tmp_path, tiny, fields, message):  # noqa: F811
    config = tiny_config(tmp_path / "run", record_dir=tmp_path / "record", **fields)
    with pytest.raises(UserError, match=message):
        run(config, progress=False)
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_model(copied, monkeypatch):
    before = snapshot(copied.run_dir)
    path = copied.run_dir / "config.json"
    narrow = stages.create_model
    monkeypatch.setattr(stages, "create_model", lambda *args: narrow(*args).clone(width=8))
    with pytest.raises(UserError, match="must be one of this model, with .*, got"):
        run(copied, progress=False)
    after = snapshot(copied.run_dir)
    before.pop("config.json")
    assert json.loads(after.pop("config.json"))["run_dir"] == str(path.parent)
    assert after == before


def test_empty_split_is_refused(monkeypatch, tmp_path):
    data = tiny_data()

    def load(*_):
        return experiments.ImageData(
            **{
                **vars(data),
                "train_images": data.train_images[:0],
                "train_labels": data.train_labels[:0],
            }
        )

    monkeypatch.setattr(experiments, "load_data", load)
    with pytest.raises(UserError, match="`train_images` must hold at least one image, got an em"):
        run(tiny_config(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_full_precision_from_a_state_dict(tmp_path, monkeypatch):
    """Of AlexNet, with no training: its variables are those of the file, and so is its accuracy."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(24, dtype=np.int32) % 10
    data = ImageData("made-up", images, labels, images, labels, 10, (0.1,) * 3, (0.2,) * 3)
    monkeypatch.setattr(experiments, "load_data", lambda *_: data)
    model = create_model("alexnet", 10)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
              10: (256, 256, 3, 3)}  # fmt: skip
    arrays = {f"features.{n}.weight": 0.05 * rng.normal(size=s) for n, s in shapes.items()}
    arrays |= {f"features.{n}.bias": rng.normal(size=s[0]) for n, s in shapes.items()}
    arrays |= {"classifier.weight": rng.normal(size=(10, 256)), "classifier.bias": np.zeros(10)}
    np.savez(tmp_path / "alexnet.npz", **arrays)
    config = tiny_config(
        tmp_path / "run", model="alexnet", dataset="cifar10", epochs=0, methods=(), batch_size=24,
        state_dict=tmp_path / "alexnet.npz", mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    table = run(config, progress=False)
    stage, state = finished(config, experiments.load_run_data(config), FULL_PRECISION)
    wanted = import_state_dict(arrays, model)
    assert tree_bytes(state.variables) == tree_bytes(wanted)
    x = (images / 255 - 0.5) / 0.25
    logits = model.apply(wanted, jax.numpy.asarray(x, np.float32))
    (result,) = read_results(config.run_dir)
    assert result["correct"] == (np.argmax(logits, -1) == labels).sum()
    assert (result["steps"], result["epochs"]) == (0, 0)
    assert f"{result['test_accuracy']:.2f} %" in table
    assert stage.fit.epochs == 0


def test_table_of_a_run_without_a_reference(whole, tmp_path, tiny):  # noqa: F811
    config = replace(
        whole[0], run_dir=tmp_path / "run", parent_dir=whole[0].run_dir, methods=(UNIFORM,),
        record_dir=None,
    )  # fmt: skip
    table = run(config, progress=False)
    assert table.splitlines()[2].split("|")[5].strip() == "-"
    assert not (config.run_dir / FULL_PRECISION).exists()
