"""Calibrating NNX models in place: as the same network in Linen, with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import assert_same, normal

import compand_jax as cj

BATCHES = [normal(n, 6, 6, 2, seed=n) for n in (8, 5)]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch", name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, axis_name="batch", rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(self.conv(x), use_running_average=not train)
        return self.head(nnx.relu(x).mean((1, 2)))


CASES = {
    "separate": (
        {"mu_scope": "separate", "grid": "midrise"},
        {"calibration": "percentile", "percentile": 99.0, "mu": 3.0, "train": True},
    ),
    "standardized": ({"weight_standardization": True, "weight_bits": 3}, {}),
    "uniform": ({"quantizer": "uniform"}, {"calibration": "absmax"}),
    "output": (
        {"mu_scope": "single", "weight_granularity": "channel", "weight_bits": 3},
        {"calibration": "output", "error_feedback": True, "batch_stats": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mu_and_scale_are_linens(name):
    fields, arguments = CASES[name]
    config, model = cj.QuantConfig(**fields), Net(nnx.Rngs(0))
    params, stats = (nnx.to_pure_dict(nnx.state(model, k)) for k in (nnx.Param, nnx.BatchStat))
    qmodel = cj.nnx.quantize(model, config)
    assert cj.nnx.calibrate(qmodel, BATCHES, **arguments) is None
    expected, variables = cj.quantize_model(LinenNet(), config).calibrate(
        {"params": params, "batch_stats": stats}, BATCHES, **arguments
    )
    assert cj.nnx.sites(qmodel) == dict(expected.sites)
    assert_same(cj.nnx.quantizers(qmodel), expected.quantizers(variables), 1e-6)
    found = nnx.to_pure_dict(nnx.state(qmodel, nnx.Param))
    found = {k: {n: v for n, v in part.items()} for k, part in found.items()}
    assert_same(found, variables["params"], 1e-6)
    own = {"norm": {k: v for k, v in variables["batch_stats"]["norm"].items()}}
    assert_same(nnx.to_pure_dict(nnx.state(qmodel, nnx.BatchStat)), own, 1e-5)
    rounded, estimated = (arguments.get(k, False) for k in ("error_feedback", "batch_stats"))
    assert (not np.allclose(found["conv"]["kernel"], params["conv"]["kernel"])) == rounded
    assert (not np.allclose(qmodel.norm.mean[...], stats["norm"]["mean"])) == estimated
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 0)  # is another's


class Stack(nnx.Module):
    """Blocks made by `nnx.vmap`, run by `nnx.scan` in a function that is jitted."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

    @nnx.jit
    def __call__(self, x):
        run = nnx.scan(
            lambda block, x: jnp.tanh(block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return run(self.blocks, x)


def test_a_stack_starts_with_the_same_mu_and_scale_and_traces_are_kept_apart():
    qmodel, batches = cj.nnx.quantize(Stack(nnx.Rngs(0)), cj.QuantConfig()), [normal(32, 4)]
    with pytest.warns(UserWarning, match="is not calibrated"):
        before = qmodel(batches[0])  # a trace that quantizes, and must not be observed instead
    kernels, x, seen = qmodel.blocks.kernel[...], batches[0], []
    for kernel, bias in zip(kernels, qmodel.blocks.bias[...], strict=True):
        seen.append(np.asarray(x))
        x = jnp.tanh(x @ kernel + bias[None])
    for _ in range(2):
        cj.nnx.calibrate(qmodel, batches, calibration="absmax")
        found = cj.nnx.quantizers(qmodel)["blocks"]
        assert {name: leaf.shape for name, leaf in found.items()} == dict.fromkeys(found, (3,))
        np.testing.assert_allclose(found["act_scale"], np.max(np.abs(seen)), rtol=1e-5)
        np.testing.assert_allclose(found["weight_scale"], np.max(np.abs(kernels)), rtol=1e-5)
    after = qmodel(batches[0])
    assert not np.allclose(before, after)
    eager = cj.nnx.quantize(cj.nnx.dequantize(qmodel), cj.QuantConfig(), sites=cj.nnx.sites(qmodel))
    nnx.update(eager, nnx.state(qmodel))
    np.testing.assert_allclose(Stack.__call__.__wrapped__(eager, batches[0]), after, atol=1e-6)


class Transformed(nnx.Module):
    """A layer that a transformation of JAX or of Flax runs."""

    def __init__(self, kind, rngs):
        self.kind, self.linear = kind, nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        layer = self.linear
        if self.kind == "vmap":
            return jax.vmap(lambda row: layer(row[None])[0])(x)
        if self.kind == "scan":
            return jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0]
        if self.kind == "checkpoint":
            return jax.checkpoint(lambda x: layer(x))(x)
        return nnx.remat(lambda layer, x: layer(x))(layer, x)


@pytest.mark.parametrize("kind", ["vmap", "scan", "checkpoint", "remat"])
def test_layers_are_seen_in_whatever_runs_them(kind):
    qmodel, x = cj.nnx.quantize(Transformed(kind, nnx.Rngs(0)), cj.QuantConfig()), normal(8, 4)
    cj.nnx.calibrate(qmodel, [x], calibration="absmax")
    after = x @ qmodel.linear.kernel[...] if kind == "scan" else x  # what the second step sees
    expected = max(np.max(np.abs(x)), np.max(np.abs(after)))
    found = cj.nnx.quantizers(qmodel)["linear"]
    np.testing.assert_allclose(found["act_scale"], expected, rtol=1e-5)
    y = nnx.jit(lambda model, x: model(x))(qmodel, x)
    mu, scale = found["weight_mu"], found["weight_scale"]
    kernel = cj.fake_quantize(qmodel.linear.kernel[...], mu, scale, bits=4)
    for _ in range(2 if kind == "scan" else 1):
        x = cj.fake_quantize(x, found["act_mu"], found["act_scale"], bits=4) @ kernel
    assert_same(y, x, 5e-6)


class Branches(nnx.Module):
    """A look-up, a cache and dropout's random numbers, and a method of another name."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.tied = nnx.Embed(5, 4, rngs=rngs)
        self.other = nnx.Linear(4, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Cache(jnp.zeros(()))

    def encode(self, ids, scale=1.0):
        x = self.dropout(self.embed(ids)) * scale
        self.last[...] = jnp.max(x)
        return self.tied.attend(x)

    def __call__(self, ids):
        return self.other(self.encode(ids))


def test_state_stays_as_it_was_and_what_did_not_run_is_said():
    rules = (cj.Rule("other", weight_bits=8), cj.Rule("tied", weight_bits=5))
    qmodel = cj.nnx.quantize(Branches(nnx.Rngs(0)), cj.QuantConfig(rules=rules))
    others = nnx.Not(nnx.Any(nnx.Param, cj.nnx.Quantizer))
    as_numbers = lambda x: x if x.dtype != jax.random.key(0).dtype else jax.random.key_data(x)  # noqa: E731
    before = jax.tree.map(as_numbers, nnx.to_pure_dict(nnx.state(qmodel, others)))
    ids = jnp.arange(5, dtype=jnp.int32)
    cj.nnx.calibrate(qmodel, [ids], method="encode", calibration="absmax", scale=2.0)
    after = jax.tree.map(as_numbers, nnx.to_pure_dict(nnx.state(qmodel, others)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert [cj.nnx.sites(qmodel)[name].weight_bits for name in ("other", "tied")] == [8, 5]
    found = cj.nnx.quantizers(qmodel)
    assert set(found["embed"]) == {"weight_mu", "weight_scale"}  # integers are looked up
    assert set(found["tied"]) == {"weight_mu", "weight_scale", "act_mu", "act_scale"}
    expected = 2.0 * 2 * np.max(np.abs(qmodel.embed.embedding[...]))  # the dropout's factor is 2
    assert 0 < float(found["tied"]["act_scale"]) <= expected * (1 + 1e-6)
    qmodel.encode(ids)
    with pytest.warns(UserWarning, match="site 'other' is not calibrated"):
        qmodel.other(jnp.ones((1, 4)))
    with pytest.raises(
        ValueError, match="site 'embed' must see activations while it is calibrated"
    ):
        qmodel.embed.attend(jnp.ones((1, 4)))


def test_what_cannot_be_calibrated_is_named():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    qmodel = cj.nnx.quantize(layer, cj.QuantConfig())
    with pytest.raises(ValueError, match="`model` must be quantized"):
        cj.nnx.calibrate(layer, [jnp.ones((2, 4))])
    with pytest.raises(TypeError, match="`batches` must be several, got an array of shape"):
        cj.nnx.calibrate(qmodel, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=r"`batches` must hold the \d positional arguments"):
        cj.nnx.calibrate(qmodel, [(jnp.ones((2, 4)), None, jnp.ones(2))])
    with pytest.raises(ValueError, match="`batches` must be finite, got NaN"):
        cj.nnx.calibrate(qmodel, [jnp.full((2, 4), jnp.nan)])
    with pytest.raises(ValueError, match="`calibration` must be one of"):
        cj.nnx.calibrate(qmodel, [jnp.ones((2, 4))], calibration="best")
    with pytest.raises(TypeError, match="`model` must be arrays with values, got tracers"):
        jax.jit(lambda x: cj.nnx.calibrate(_traced(qmodel, x), [x]))(jnp.ones((2, 4)))
    qmodel.kernel[...] = jnp.full((4, 3), jnp.nan)
    with pytest.raises(ValueError, match="`model` must be finite, the weight of site '' is not"):
        cj.nnx.calibrate(qmodel, [jnp.ones((2, 4))])
    idle = cj.nnx.quantize(Branches(nnx.Rngs(0)), cj.QuantConfig())
    with pytest.raises(ValueError, match="`batches` must run a quantized layer of the model's"):
        cj.nnx.calibrate(idle, [jnp.ones((2, 4))], method="dropout")


def _traced(model, x):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 0 * jnp.sum(x), state))
