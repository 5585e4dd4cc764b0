"""What a frozen model's `apply` takes and returns: fields, numbers and objects besides arrays."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY, Net, NormedNet, drawn, normal, quantize_by_hand

import compand_jax as cj
from compand_jax.frozen.identity import Fixed
from compand_jax.frozen.model import _run

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=None)
X = (5, 4)


def by_hand(variables, x, name="dense"):
    """A dense layer's output, in float64."""
    weight = quantize_by_hand(
        variables["params"][name]["kernel"], variables["compand"][name], "weight"
    )
    product = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    return product + np.asarray(variables["params"][name]["bias"])


class Fields(nn.Module):
    """A dense layer on inputs from which a field is subtracted."""

    field: object

    @nn.compact
    def __call__(self, x):
        mean = self.field["mean"] if isinstance(self.field, Mapping) else self.field
        mean = getattr(mean, "mean", mean) if dataclasses.is_dataclass(mean) else mean
        return nn.Dense(3, name="dense")(x - jnp.asarray(mean))


@dataclasses.dataclass(frozen=True)
class Stats:
    mean: np.ndarray


MEAN = np.arange(4, dtype=np.float32).reshape(1, 4)
MAKE = {
    "numpy": lambda mean: mean,
    "jax": jnp.asarray,
    "in a dict": lambda mean: {"mean": mean},
    "in a dataclass": Stats,
}


@pytest.mark.parametrize("kind", MAKE)
def test_models_that_differ_in_a_field_of_arrays(kind, tmp_path):
    x, models = normal(*X), [Fields(MAKE[kind](mean)) for mean in (MEAN, MEAN + 1, MEAN.copy())]
    variables = drawn(cj.quantize_model(models[0], CONFIG), x)
    jitted = jax.jit(lambda frozen, x: frozen.apply(x))
    for model, mean in zip(models, (MEAN, MEAN + 1, MEAN), strict=True):
        frozen = cj.freeze(cj.quantize_model(model, CONFIG), variables, x)
        frozen.save(tmp_path / "model.safetensors")
        loaded = cj.load_frozen(tmp_path / "model.safetensors", model)
        expected = by_hand(variables, np.asarray(x) - mean)
        for found in (frozen.apply(x), loaded.apply(x), jitted(frozen, x)):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert jitted._cache_size() == 2  # the third model's field equals the first's


@pytest.mark.quick
def test_what_is_fixed_is_told_apart_by_type_and_content():
    same = [1, 1.0, True, np.float32(1), 0.0, -0.0, "1", None, (1,), [1], {"a": 1}, {"b": 1},
            np.ones(2), np.ones(2, np.float32), np.ones((2, 1)), np.zeros(2), jnp.ones(2),
            jax.random.key(0), jax.random.key(1), nn.Dense(1), nn.Dense(2), nn.Dense(True),
            np.array([None, 1]), np.array([None, 2])]  # fmt: skip
    for i, value in enumerate(same):
        assert [Fixed(value) == Fixed(other) for other in same] == [
            i == k for k in range(len(same))
        ]
        assert hash(Fixed(value)) == hash(Fixed(value))
    first, second = [slice(None), {1}], object()
    assert Fixed(second) == Fixed(second) != Fixed(object())
    assert Fixed(first) == Fixed(first)
    assert Fixed(float("nan")) == Fixed(float("nan"))


class Scaled(nn.Module):
    """A dense layer times a number, or in doubt."""

    @nn.compact
    def __call__(self, x, factor, flag=None):
        y = nn.Dense(3, name="dense")(x) * factor
        return y + 10 if flag is True else y + 20 if flag == 1 else y


def test_a_float_is_traced_and_a_flag_is_none_of_its_equals():
    qmodel, x = cj.quantize_model(Scaled(), CONFIG), normal(*X)
    variables = drawn(qmodel, x, 1.0)
    frozen = cj.freeze(qmodel, variables, x, 0.5)
    before, expected = _run._cache_size(), by_hand(variables, x)
    for factor in (0.5, 0.25, -3.0):
        np.testing.assert_allclose(frozen.apply(x, factor), expected * factor, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            frozen.apply(x, factor), jax.jit(qmodel.apply)(variables, x, factor)
        )
    assert _run._cache_size() == before + 1
    for flag, shift in ((True, 10), (1, 20), (1.0, 20), (False, 0), (0, 0)):
        found = frozen.apply(x, 2.0, flag=flag)
        np.testing.assert_allclose(found, expected * 2 + shift, rtol=1e-5, atol=1e-5)


class Rate(nn.Module):
    """A model that needs the value of a number."""

    @nn.compact
    def __call__(self, x, rate):
        y = nn.Dense(3, name="dense")(x)
        return nn.Dropout(rate, deterministic=False)(y) if rate > 0 else y


def test_a_float_whose_value_is_needed():
    qmodel, x = cj.quantize_model(Rate(), CONFIG), normal(*X)
    variables = drawn(qmodel, x, rate=0.0)
    frozen, expected = cj.freeze(qmodel, variables, x, rate=0.0), by_hand(variables, x)
    np.testing.assert_allclose(frozen.apply(x, rate=0.0), expected, rtol=1e-5, atol=1e-6)
    for _ in range(2):
        found = np.asarray(frozen.apply(x, rate=0.5, rngs={"dropout": KEY}))
        kept = found != 0
        assert 0 < kept.mean() < 1
        np.testing.assert_allclose(found[kept], 2 * expected[kept], rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'rate'"):
        frozen.apply(x)


class Outcome:
    """An object that is no pytree."""

    def __init__(self, logits):
        self.logits = logits


class Policy(nn.Module):
    """A model that returns more than arrays."""

    kind: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, name="dense")(x)
        if self.kind == "object":
            return Outcome(y)
        return {"logits": y, "kind": self.kind, "bins": 3, "half": 0.5, "nothing": None}


def test_outputs_that_are_no_arrays(tmp_path):
    x = normal(*X)
    variables = drawn(cj.quantize_model(nn.Sequential([nn.Dense(3)]), CONFIG), x)
    variables = {name: {"dense": tree["layers_0"]} for name, tree in variables.items()}
    expected = by_hand(variables, x)
    for kind in ("categorical", "object"):
        frozen = cj.freeze(cj.quantize_model(Policy(kind), CONFIG), variables, x)
        frozen.save(tmp_path / "policy.safetensors")
        loaded = cj.load_frozen(tmp_path / "policy.safetensors", Policy(kind))
        for each in (frozen, loaded, frozen):
            found = each.apply(x)
            logits = found.logits if kind == "object" else found.pop("logits")
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
            if kind != "object":
                assert found == {"kind": kind, "bins": 3, "half": 0.5, "nothing": None}


@pytest.mark.parametrize(
    ("model", "fold_norms"),
    [(NormedNet(), True), (Net(nn.WeightNorm(nn.Dense(6))), False)],
    ids=["folded norms", "computed weights"],
)
def test_no_tracer_is_left_behind(model, fold_norms, tmp_path):
    x = normal(*X)
    qmodel = cj.quantize_model(model, CONFIG)
    variables = drawn(qmodel, x)
    with jax.check_tracer_leaks():
        frozen = cj.freeze(qmodel, variables, x, fold_norms=fold_norms)
        frozen.apply(x)
        frozen.save(tmp_path / "model.safetensors")
        cj.load_frozen(tmp_path / "model.safetensors", model)
