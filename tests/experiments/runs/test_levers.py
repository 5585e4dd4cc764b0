"""What lifts accuracy at low bits: each on for every method alike, and off by default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# Fixtures are imported to be found (F401), and named again where they are used (F811).
from tiny_runs import (
    TinyNet,
    standard_promotion,  # noqa: F401
    tiny,  # noqa: F401
    tiny_config,
    tiny_variables,
)

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs import run as experiments
from compand_jax.experiments.runs import stages
from compand_jax.experiments.runs.config import (
    CONTROL,
    FULL_PRECISION,
    Method,
    RunConfig,
    from_json,
    to_json,
)
from compand_jax.experiments.runs.levers import levers, quant_of
from compand_jax.experiments.runs.optimizer import make_optimizer, make_schedules
from compand_jax.experiments.runs.run import train_stages
from compand_jax.experiments.runs.stages import _training_images, finished, make_stage
from compand_jax.layers.config import QuantConfig, Rule
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model
from compand_jax.models import create_model
from compand_jax.training.steps import Teacher

UNIFORM = Method("uniform")
ALL = {
    "first_last_bits": 8,
    "quantizer_optimizer": "sgd",
    "transition_rate": 0.01,
    "preceding_bits": (4, 3),
    "distillation_weight": 0.5,
    "batch_stats_batches": 2,
    "quant": QuantConfig(weight_standardization=True),
}


@pytest.mark.quick
def test_names_of_what_is_on():
    assert levers(RunConfig(), UNIFORM) == levers(RunConfig(), CONTROL) == ()
    config = RunConfig(**ALL)
    assert levers(config, CONTROL) == ("bn", "distill")
    assert levers(config, UNIFORM) == (
        "bn", "distill", "ends8", "lsq", "progressive", "standardize", "transitions"
    )  # fmt: skip
    lsq = RunConfig(quant=QuantConfig(mu_gradient="lsq"))
    assert levers(lsq, UNIFORM) == ("lsq",)
    assert from_json(to_json(config)) == config


@pytest.mark.quick
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"first_last_bits": 9}, "`first_last_bits` must be None or an integer from 1 to 8, got 9"),
        ({"quantizer_optimizer": "x"}, "`quantizer_optimizer` must be one of adam, sgd, got 'x'"),
        ({"transition_rate": 0.0}, "`transition_rate` must be None or a number above 0, at most 1"),
        (
            {"transition_rate": 0.1, "finetune_learning_rate": 0.0},
            "`finetune_learning_rate` must be above 0 with `transition_rate`",
        ),
        ({"preceding_bits": (1,)}, r"`preceding_bits` must be integers from 2 to 8, got \(1,\)"),
        ({"distillation_weight": 1.5}, "`distillation_weight` must be from 0 to 1, got 1.5"),
        ({"distillation_temperature": 0.0}, "`distillation_temperature` must be a finite number"),
        ({"batch_stats_batches": -1}, "`batch_stats_batches` must be an integer of at least 0"),
    ],
)
def test_fields_out_of_their_range(fields, match):
    with pytest.raises(UserError, match=match):
        RunConfig(**fields)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["alexnet-bn", "vgg19"])
def test_first_and_last_layer_have_bits_of_their_own(name):
    quant = QuantConfig(weight_bits=2, act_bits=2, grid="midrise")
    config = quant_of(RunConfig(first_last_bits=8, quant=quant), UNIFORM)
    model = quantize_model(create_model(name, 10), config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    sites = list(shapes["compand"])
    convs = sorted((site for site in sites if site != "dense"), key=lambda site: int(site[4:]))
    assert (convs[0], "dense" in sites) == ("conv1", True)
    bits = {site: (config.at(site).weight_bits, config.at(site).act_bits) for site in sites}
    assert bits == dict.fromkeys(sites, (2, 2)) | dict.fromkeys(("conv1", "dense"), (8, 8))
    assert config.at("conv1").grid == "midtread"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("full_precision", ["learning_rate"]),
        ("full_precision_continued", ["finetune_learning_rate"]),
        ("uniform", ["finetune_learning_rate", "mu_learning_rate", "scale_learning_rate",
                     "transition_rate"]),
    ],
)  # fmt: skip
def test_divergence_names_the_fields_of_its_stage(name, fields, tiny, tmp_path, monkeypatch):  # noqa: F811
    def diverges(*args, **kwargs):
        raise FloatingPointError("`learning_rate` must keep the training finite: lower it")

    config = tiny_config(tmp_path / "run", transition_rate=0.01)
    stage = make_stage(config, tiny, name)
    monkeypatch.setattr(experiments, "fit", diverges)
    monkeypatch.setattr(experiments, "start_or_resume", lambda stage, _: (stage, None, {}))
    named = " or ".join(f"`{field}`" for field in fields)
    with pytest.raises(UserError, match=f"^{named} must keep the training finite: lower it"):
        experiments._run_stage(config, stage, progress=False)


def test_a_network_without_such_layers_is_refused(tiny, tmp_path):  # noqa: F811
    config = tiny_config(tmp_path / "run", first_last_bits=8, methods=(UNIFORM,))
    with pytest.raises(UserError, match="`rules` must each match a site, 'conv1' matches none of"):
        make_stage(config, tiny, "uniform")


def test_a_teachers_answers_are_mixed_in():
    rng = np.random.default_rng(0)
    images, logits = rng.normal(size=(5, 4, 4, 1)), rng.normal(size=(5, 3))
    losses, t, w = rng.uniform(size=5), 3.0, 0.25
    teacher = Teacher(tiny_variables(), TinyNet(), w, t)
    given = (jnp.asarray(x, jnp.float32) for x in (losses, logits, images))
    found = teacher.mixed(*given)
    own = np.asarray(
        TinyNet().apply(tiny_variables(), jnp.asarray(images, jnp.float32)), np.float64
    )
    p, q = (np.exp(x / t) / np.exp(x / t).sum(1, keepdims=True) for x in (own, logits))
    wanted = (1 - w) * losses - w * t**2 * np.sum(p * np.log(q), 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_sgd_moves_what_theta_and_rho_are_the_logarithms_of():
    config = RunConfig(quantizer_optimizer="sgd", mu_learning_rate=1e-3, scale_learning_rate=1e-3)
    schedules = make_schedules(config, UNIFORM, 10, 10) | {
        f"{name}_learning_rate": optax.constant_schedule(1e-3) for name in ("mu", "scale")
    }
    tx = make_optimizer(config, schedules, quantize_model(TinyNet(), QuantConfig()))
    mu, scale, slopes = 1.5, 0.2, (0.7, -0.3)  # of the loss, in mu and in scale
    params = {"compand": {"weight_mu": jnp.log1p(mu), "weight_scale": jnp.log(scale)}}
    grads = {"weight_mu": (1 + mu) * slopes[0], "weight_scale": scale * slopes[1]}
    grads = {"compand": {name: jnp.float32(value) for name, value in grads.items()}}
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)["compand"]
    step = 1.9e-3  # with Nesterov's momentum 0.9, at first
    np.testing.assert_allclose(jnp.expm1(after["weight_mu"]), mu - step * slopes[0], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(after["weight_scale"]), scale - step * slopes[1], rtol=1e-4)


STANDARD = {"weight_standardization": True, "scale_gradient": "lsq", "mu_gradient": "lsq"}


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A run with all that its network can have, and its data.

    Only what comes last is trained; what is before is moved a little, to compile less.
    """
    whole = experiments.fit

    def fit(state, data, config, **kwargs):
        model = kwargs["model"]
        if isinstance(model, QuantizedModel) and model.config.weight_bits == 3:
            return whole(state, data, config, **kwargs)
        steps = config.epochs * config.steps_per_epoch(len(data.train_labels))
        moved = jax.tree.map(lambda leaf: leaf * 1.01, state.params)
        state = kwargs["at_end"](state.replace(step=jnp.int32(steps), params=moved))
        kwargs["checkpoints"].save(steps, state, kwargs["metadata"])
        kwargs["log"].write_text("")
        return state

    monkeypatch.setattr(experiments, "fit", fit)
    monkeypatch.setattr(stages, "count_correct", lambda *_: 0)
    fields = {**ALL, "preceding_bits": (4,), "first_last_bits": None}
    quant = QuantConfig(3, 3, rules=(Rule("dense", weight_bits=None),), **STANDARD)
    config = tiny_config(
        tmp_path / "run", methods=(CONTROL, UNIFORM), **(fields | {"quant": quant})
    )
    train_stages(config, tiny, progress=False)
    return config, tiny


def test_all_at_once(run):
    config, data = run
    before = dataclasses.replace(
        config, run_dir=config.run_dir / "w4a4", parent_dir=config.run_dir, preceding_bits=(),
        quant=dataclasses.replace(config.quant, weight_bits=4, act_bits=4),
    )  # fmt: skip
    # The fine-tuning starts where the one at four bits ended, that one at full precision's end.
    for own, start in ((config, (before, "uniform")), (before, (config, FULL_PRECISION))):
        model, variables = make_stage(own, data, "uniform").start()
        end = finished(start[0], data, start[1])[1].variables
        jax.tree.map(np.testing.assert_array_equal, variables["params"], end["params"])
        assert model.config.weight_bits == own.quant.weight_bits
    # The control is trained as long as both together.
    _, state = finished(config, data, CONTROL.name)
    assert int(state.step) == 2 * int(finished(config, data, "uniform")[1].step) == 8
    # Its statistics are the mean of its batches'.
    images = list(_training_images(config, data, 2, purpose=3))
    kernel = state.params["params"]["conv"]["kernel"]
    outputs = [
        jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for x in images
    ]
    mean = np.mean([np.mean(y, (0, 1, 2)) for y in outputs], 0)
    np.testing.assert_allclose(state.model_state["batch_stats"]["norm"]["mean"], mean, atol=1e-5)
    # Every leaf has moved, what is not quantized as well.
    _, at_start = make_stage(config, data, "uniform").start()
    at_end = finished(config, data, "uniform")[1].variables
    for name in ("kernel", "bias"):
        ends = (tree["params"]["dense"][name] for tree in (at_start, at_end))
        assert not np.array_equal(*ends)
