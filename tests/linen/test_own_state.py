"""Models that keep state of their own, are part of a mapped axis, or return what is no array."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, drawn, normal

import compand_jax as cj

X = normal(5, 4)
BATCHES = (X, normal(5, 4, seed=1), 2 * normal(3, 4, seed=2))
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=3)


class Averaged(nn.Module):
    """Keeps an average of its input, which its output does not depend on."""

    kept: bool = True

    @nn.compact
    def __call__(self, x):
        if self.kept:
            average = self.variable("ema", "mean", lambda: jnp.zeros(4))
            average.value = 0.9 * average.value + 0.1 * x.mean(0)
        return nn.Dense(3, name="dense")(x)


@pytest.mark.parametrize("arguments", [{}, {"mutable": ["ema"]}, {"error_feedback": True}])
def test_an_average_is_returned_as_it_was(arguments):
    variables = Averaged().init(jax.random.key(0), X)
    plain = {name: value for name, value in variables.items() if name != "ema"}
    qmodel, found = cj.quantize_model(Averaged(), CONFIG).calibrate(variables, BATCHES, **arguments)
    assert_same(found["ema"], variables["ema"])
    arguments = {name: value for name, value in arguments.items() if name != "mutable"}
    _, wanted = cj.quantize_model(Averaged(kept=False), CONFIG).calibrate(
        plain, BATCHES, **arguments
    )
    assert_same(found["compand"], wanted["compand"])
    assert_same(found["params"], wanted["params"])
    _, updates = qmodel.apply(found, X, mutable=["ema"])
    np.testing.assert_allclose(
        updates["ema"]["mean"], 0.9 * variables["ema"]["mean"] + 0.1 * X.mean(0), rtol=1e-6
    )


def test_a_decoder_with_a_cache():
    model = nn.MultiHeadDotProductAttention(2, qkv_features=4, decode=True)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 6, 4)))  # a cache of six tokens
    tokens = [normal(2, 1, 4, seed=i) for i in range(3)]
    qmodel, found = cj.quantize_model(model, CONFIG).calibrate(variables, tokens)
    assert_same(found["cache"], variables["cache"])
    # Each batch starts from the empty cache: what comes out of attention is the token's own value.
    value = variables["params"]["value"]
    seen = [
        np.einsum("btd,dhk->bthk", x, value["kernel"]) + np.asarray(value["bias"]) for x in tokens
    ]
    _, found = cj.quantize_model(model, CONFIG).calibrate(variables, tokens, calibration="absmax")
    top = max(np.abs(x).max() for x in seen)
    assert float(qmodel.quantizers(found)["out"]["act_scale"]) == pytest.approx(top, rel=1e-5)
    state = found
    for x in tokens:
        y, updates = qmodel.apply(state, x, mutable=["cache"])
        state = {**state, **updates}
    assert y.shape == (2, 1, 4)
    assert int(state["cache"]["cache_index"]) == 3


class Spectral(nn.Module):
    update: bool

    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(4, name="first"))(x, update_stats=self.update)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(3, name="second")(x)


def test_vectors_of_spectral_norms_stay():
    model = Spectral(update=True)
    variables = model.init(jax.random.key(0), X)
    _, found = cj.quantize_model(model, CONFIG).calibrate(variables, BATCHES, batch_stats=True)
    before, after = variables["batch_stats"], found["batch_stats"]
    (spectral,) = before.keys() - {"norm"}
    assert_same(after[spectral], before[spectral])
    assert not np.array_equal(after["norm"]["mean"], before["norm"]["mean"])


class Mapped(nn.Module):
    """A network as it is trained under pmap: its statistics are of the whole mapped axis."""

    axis_name: str | None
    train: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="first")(x)
        norm = nn.BatchNorm(not train, axis_name=self.axis_name, name="norm")
        return nn.Dense(3, name="second")(nn.relu(norm(x)))


@pytest.mark.parametrize("train", [False, True])
def test_batch_norms_of_a_mapped_axis(train):
    variables = drawn(Mapped(None), X)
    results = [
        cj.quantize_model(Mapped(name), CONFIG).calibrate(
            variables, BATCHES, batch_stats=True, train=train
        )[1]
        for name in (None, "batch")
    ]
    assert_same(*results)
    moved = results[0]["batch_stats"]["norm"]["mean"] - variables["batch_stats"]["norm"]["mean"]
    assert np.abs(moved).max() > 0


@dataclasses.dataclass
class Categorical:
    """A distribution that jax does not know."""

    logits: jax.Array

    def mode(self):
        return self.logits.argmax(-1)


class Policy(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, name="dense")(x)
        if self.kind == "dictionary":
            return {"logits": y, "kind": "categorical", "act": jnp.tanh}
        return Categorical(y) if self.kind == "object" else (y, Categorical(y), None, 3)


def logits_of(output):
    if isinstance(output, dict):
        assert output["kind"] == "categorical"
        assert output["act"] is jnp.tanh
        return output["logits"]
    if isinstance(output, tuple):
        assert output[2:] == (None, 3)
        return output[1].logits
    return output.logits


@pytest.mark.parametrize("kind", ["dictionary", "object", "tuple"])
def test_outputs_that_are_no_arrays(kind):
    model = Policy(kind)
    variables = {"params": {"dense": drawn(nn.Dense(3), X)["params"]}}
    qmodel, found = cj.quantize_model(model, CONFIG).calibrate(variables, BATCHES)
    by_hand = qmodel.quantizers(found)["dense"]
    x, kernel = (
        cj.fake_quantize(value, by_hand[f"{operand}_mu"], by_hand[f"{operand}_scale"], bits=3)
        for operand, value in (("act", X), ("weight", variables["params"]["dense"]["kernel"]))
    )
    wanted = x @ kernel + variables["params"]["dense"]["bias"][None]
    for call in (qmodel.apply, jax.jit(lambda *args: logits_of(qmodel.apply(*args)))):
        output = call(found, X)
        logits = output if isinstance(output, jax.Array) else logits_of(output)
        np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)
