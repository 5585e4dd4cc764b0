"""What is trained in each stage, by which optimizer, and from where it starts."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from tiny_runs import (
    TinyNet,
    replace,
    standard_promotion,  # noqa: F401
    tiny_config,
    tiny_data,
    tiny_variables,
    use_tiny,
)

from compand_jax import QuantConfig, partition_optimizer
from compand_jax.data.images import normalize
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs import stages
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION, to_json
from compand_jax.layers.partition import label_parameters
from compand_jax.training.checkpoints import Checkpoints
from compand_jax.training.fit import fit
from compand_jax.training.steps import TrainState, create_state

CONTINUED, MU_LAW = CONTROL.name, "mu_law-separate"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run whose full-precision stage is trained; its configuration, and the end of that."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        config, data = tiny_config(tmp_path_factory.mktemp("run")), tiny_data()
        with checkpoints_of(config, FULL_PRECISION) as checkpoints:
            stage, state, metadata = begin(config, FULL_PRECISION, checkpoints)
            assert metadata == {}
            assert int(state.step) == 0
            end = fit(
                state, data, stage.fit, model=stage.model, tx=stage.tx, checkpoints=checkpoints
            )
        yield config, end


def checkpoints_of(config, name):
    return Checkpoints(config.run_dir / name / "checkpoints")


def begin(config, name, checkpoints=None) -> tuple[stages.Stage, TrainState, dict]:
    data = tiny_data()
    stage = stages.make_stage(config, data, name)
    return stages.start_or_resume(stage, checkpoints or checkpoints_of(config, name))


@pytest.mark.parametrize("name", [CONTINUED, "uniform", MU_LAW])
def test_fine_tuning_starts_from_the_full_precision_variables(parent, name):
    config, end = parent
    _, state, _ = begin(config, name)
    assert int(state.step) == 0
    chex.assert_trees_all_equal(state.params["params"], end.params["params"])
    chex.assert_trees_all_equal(state.model_state, end.model_state)
    momenta = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32]
    assert not any(np.any(leaf) for leaf in momenta)
    assert ("compand" in state.params) == (name != CONTINUED)


def test_calibrated_accuracy_is_that_of_the_start(parent):
    config, _ = parent
    stage, state, metadata = begin(config, MU_LAW)
    data = tiny_data()
    images = normalize(data.test_images, data.mean, data.std)
    logits = np.asarray(stage.model.apply(state.variables, images, train=False))
    assert metadata["calibrated_correct"] == (logits.argmax(-1) == data.test_labels).sum()
    assert set(metadata["sites"]) == {"conv", "dense"}
    assert metadata["sites"]["conv"]["act_signed"] is True
    assert metadata["sites"]["dense"]["act_signed"] is False  # after the ReLU


def test_control_and_methods_have_one_schedule(parent):
    config, _ = parent
    data = tiny_data()
    control, uniform, mu_law = (
        stages.make_stage(config, data, name) for name in (CONTINUED, "uniform", MU_LAW)
    )
    assert control.fit == uniform.fit == mu_law.fit
    rates = [
        [float(stage.schedules["learning_rate"](step)) for step in range(5)]
        for stage in (control, uniform, mu_law)
    ]
    assert rates[0] == rates[1] == rates[2]
    # Half an epoch of two steps to the peak, then half a cosine over the other two.
    assert rates[0] == pytest.approx([0, 0.01, 0.02, 0.01, 0], abs=1e-8)
    first = stages.make_stage(config, data, FULL_PRECISION)
    assert first.fit.epochs == 2
    assert max(float(first.schedules["learning_rate"](step)) for step in range(8)) == (
        pytest.approx(0.05)
    )


def test_schedule_without_warm_up(parent):
    config = replace(parent[0], warmup_epochs=0.0)
    schedule = stages.make_stage(config, tiny_data(), CONTINUED).schedules["learning_rate"]
    assert [float(schedule(step)) for step in (0, 2, 4)] == pytest.approx([0.02, 0.01, 0])


def test_weight_decay_reaches_kernels_alone(parent):
    config = replace(parent[0], weight_decay=100.0, warmup_epochs=0.0)
    stage, state, _ = begin(config, MU_LAW)
    gradients = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(stage.tx.update)(gradients, state.opt_state, state.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["compand"]))
    for layer, leaves in updates["params"].items():
        for name, leaf in leaves.items():
            assert np.any(leaf) == (name == "kernel"), (layer, name)
    # Momentum 0.9 of Nesterov's kind: rate x (1 + 0.9) x decay.
    kernel = state.params["params"]["conv"]["kernel"]
    expected = -0.02 * 1.9 * 100 * kernel
    np.testing.assert_allclose(updates["params"]["conv"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.003, 1000.0])
def test_mu_and_scale_move_and_mu_stays_in_its_bounds(parent, rate):
    config = replace(parent[0], mu_learning_rate=rate, finetune_epochs=3)
    stage, state, _ = begin(config, "mu_law-per_layer")
    seen = []
    describe = jax.jit(lambda state: stage.quantized.quantizers(state.variables))

    def record(state):
        seen.append(jax.device_get(describe(state)))
        return {}

    start = jax.device_get(describe(state))
    fit(state, tiny_data(), stage.fit, model=stage.model, tx=stage.tx, describe=record)
    assert len(seen) == 6
    for site in ("conv", "dense"):
        for name in ("weight_mu", "weight_scale", "act_mu", "act_scale"):
            values = np.array([start[site][name], *(each[site][name] for each in seen)])
            assert np.isfinite(values).all()
            assert np.ptp(values) > 0, (site, name)
            if name.endswith("mu"):
                assert values.min() >= 0
                assert values.max() <= 255 * (1 + 1e-6)
            else:
                assert values.min() > 0
    every_mu = [
        each[site][f"{kind}_mu"] for each in seen for site in each for kind in ("weight", "act")
    ]
    assert (min(every_mu) == 0 or max(every_mu) > 254) == (rate == 1000)


def test_resumes_with_the_sites_of_its_checkpoint(parent):
    config = replace(parent[0], seed=0, run_dir=parent[0].run_dir)
    with checkpoints_of(config, MU_LAW) as checkpoints:
        stage, state, metadata = begin(config, MU_LAW, checkpoints)
        checkpoints.save(3, state.replace(step=jnp.int32(3)), metadata)
    resumed, state, found = begin(config, MU_LAW)
    assert int(state.step) == 3
    assert resumed.model == stage.model
    assert found == json.loads(json.dumps(metadata))
    other = replace(config, quant=QuantConfig(weight_granularity="channel"))
    with pytest.raises(UserError, match="must be one of this model, with .*weight_scale float32"):
        begin(other, MU_LAW)


def test_calibration_batches_are_augmented_training_images(parent, monkeypatch):
    seen = []

    def calibrate(qmodel, variables, batches, **_):
        seen.append([np.asarray(batch) for batch in batches])
        return qmodel, variables

    monkeypatch.setattr(stages.QuantizedModel, "calibrate", calibrate)
    data = tiny_data()
    for fields in ({}, {"pad": 2}):
        config = replace(parent[0], calibration_batches=6, **fields)
        stages.make_stage(config, data, MU_LAW).start()
    batches, augmented = seen
    assert [batch.shape for batch in batches] == [(16, 4, 4, 1)] * 6
    everything = np.asarray(normalize(data.train_images, data.mean, data.std))
    # All 64 images once, in another order; then from the front again.
    assert sorted(map(bytes, np.concatenate(batches[:4]))) == sorted(map(bytes, everything))
    np.testing.assert_array_equal(batches[4], batches[0])
    assert np.any(augmented[0] != batches[0])


def test_a_parent_elsewhere_is_what_the_fine_tuning_starts_from(parent):
    config, end = parent
    child = replace(config, run_dir=config.run_dir / "child", parent_dir=config.run_dir, seed=7)
    (config.run_dir / "config.json").write_text(json.dumps(to_json(config)))
    _, state, _ = begin(child, CONTINUED)
    chex.assert_trees_all_equal(state.params["params"], end.params["params"])
    own = begin(config, CONTINUED)[1]
    assert np.any(jax.random.key_data(state.key) != jax.random.key_data(own.key))
    with pytest.raises(UserError, match="`run_dir` must be a run's directory, with config"):
        begin(replace(child, parent_dir=config.run_dir / "none"), CONTINUED)


def test_calibration_holds_the_mu_that_is_given(parent):
    config = replace(parent[0], calibration_mu=255.0)
    stage, state, _ = begin(config, MU_LAW, checkpoints_of(config, "none"))
    found = stage.quantized.quantizers(state.variables)
    mus = [found[site][f"{kind}_mu"] for site in found for kind in ("weight", "act")]
    np.testing.assert_allclose(mus, 255, rtol=1e-5)


@pytest.mark.quick
def test_state_bytes(monkeypatch, tmp_path):
    use_tiny(monkeypatch)
    stage = stages.make_stage(tiny_config(tmp_path), tiny_data(), FULL_PRECISION)
    variables = tiny_variables()
    trained = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    statistics = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
    assert stage.state_bytes == pytest.approx(4 * (2 * trained + statistics), abs=8)  # and the step


@pytest.mark.quick
def test_partition_labels_and_refuses_what_it_does_not_know():
    variables = {
        "params": {"mu": 1.0, "scale": 1.0},
        "compand": {"_shared": {"weight_mu": 1.0}, "dense": {"act_scale": 1.0}},
    }
    assert label_parameters(variables) == {
        "params": {"mu": "weights", "scale": "weights"},
        "compand": {"_shared": {"weight_mu": "mu"}, "dense": {"act_scale": "scale"}},
    }
    tx = partition_optimizer(optax.sgd(1.0), mu=optax.sgd(2.0), scale=optax.sgd(3.0))
    ones = jax.tree.map(jnp.asarray, variables)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    assert float(updates["params"]["mu"]) == -1
    assert float(updates["compand"]["_shared"]["weight_mu"]) == -2
    assert float(updates["compand"]["dense"]["act_scale"]) == -3
    tx.init({"params": ones["params"]})
    for wrong in ({"compand": {"x": {"bias": 1.0}}}, {"batch_stats": {"mu": 1.0}}):
        with pytest.raises(ValueError, match="`params` of the optimizer must be .* got"):
            tx.init(wrong)


@pytest.mark.quick
def test_first_layer_in_full_precision_has_no_parameters_to_train():
    model = TinyNet()
    config = QuantConfig(mu_scope="single")
    variables = stages.quantize_model(model, config).init(
        jax.random.key(0), jnp.zeros((1, 4, 4, 1))
    )
    tx = optax.sgd(0.1)
    state = create_state(variables, tx, jax.random.key(0))
    assert set(state.params["compand"]) == {"_shared", "conv", "dense"}
    assert set(state.params["compand"]["_shared"]) == {"mu"}
