"""Batch norms folded into the weights before them: which ones can be, and with what difference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Block, NormedNet, drawn, normal, quantize_by_hand

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
X = (2, 6, 6, 4)
EVAL = {"use_running_average": True}


class Normed(nn.Module):
    """A layer and its batch norm, in whatever way they are put together."""

    layer: nn.Module
    options: tuple = ()
    between: str = ""

    @nn.compact
    def __call__(self, x):
        y = self.layer(x)
        y = nn.relu(y) if self.between == "relu" else y.astype(jnp.float32)
        z = nn.BatchNorm(**EVAL, **dict(self.options), name="norm")(y)
        if self.between == "skip":
            z = z + y
        if self.between == "twice":
            z = z + nn.BatchNorm(**EVAL, name="other")(y)
        return z


def frozen_twice(model, x, **config):
    qmodel = cj.quantize_model(model, cj.QuantConfig(act_bits=None, **config))
    variables = drawn(qmodel, x)
    rng = np.random.default_rng(2)
    norm = variables["params"].get("norm", {})
    if "scale" in norm:  # of both signs
        norm["scale"] *= rng.choice([-1.0, 1.0], norm["scale"].shape).astype(np.float32)
    plain, folded = (cj.freeze(qmodel, variables, x, fold_norms=fold) for fold in (False, True))
    return plain, folded, variables


FOLDABLE = {
    "conv": (lambda: nn.Conv(6, (3, 3), use_bias=False), X),
    "conv_depthwise": (lambda: nn.Conv(8, (3, 3), feature_group_count=4), X),
    "conv_transpose": (lambda: nn.ConvTranspose(6, (3, 3), (2, 2)), X),
    "transpose_kernel": (lambda: nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True), X),
    "transpose_kernel_square": (lambda: nn.ConvTranspose(4, (2, 2), transpose_kernel=True), X),
    "conv_local": (lambda: nn.ConvLocal(6, (3, 3)), X),
    "dense_general": (lambda: nn.DenseGeneral(6, axis=(-2, -1)), (5, 4, 2)),
    "weight_norm": (lambda: nn.WeightNorm(nn.Dense(6)), (5, 4)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_same_to_rounding_without_the_norms_variables(name, tmp_path):
    make, shape = FOLDABLE[name]
    per_channel = ("conv", "dense_general", "transpose_kernel", "transpose_kernel_square")
    granularity = "channel" if name in per_channel else "tensor"
    model, x = Normed(make()), normal(*shape)
    plain, folded, _ = frozen_twice(model, x, weight_granularity=granularity)
    assert list(folded.shifts()) == ["norm"]
    assert not [path for path in folded.arrays["variables"] if "norm/" in path]
    expected, found = plain.apply(x), folded.apply(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(folded.apply_dense(x), found, rtol=1e-5, atol=1e-4)
    folded.save(tmp_path / "folded.safetensors")
    again = cj.load_frozen(tmp_path / "folded.safetensors", model)
    np.testing.assert_array_equal(again.apply(x), found)


@pytest.mark.parametrize("leaves", ["scale", "bias", ""])
def test_norms_without_scale_or_bias(leaves, tmp_path):
    options = (("use_scale", leaves == "scale"), ("use_bias", leaves == "bias"), ("epsilon", 0.3))
    model, x = Normed(nn.Dense(6), options), normal(5, 4)
    plain, folded, _ = frozen_twice(model, x)
    np.testing.assert_allclose(folded.apply(x), plain.apply(x), rtol=1e-5, atol=1e-5)
    folded.save(tmp_path / "folded.safetensors")
    cj.load_frozen(tmp_path / "folded.safetensors", model)


@pytest.mark.parametrize("axis", [-1, 1, (-1,), (1,), [-1]])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_folded_norm_by_hand(axis, granularity):
    model, x = Normed(nn.Dense(6), (("axis", axis),)), normal(5, 4)
    _, folded, variables = frozen_twice(model, x, weight_granularity=granularity)
    assert list(folded.shifts()) == ["norm"]
    params, stats = variables["params"], variables["batch_stats"]["norm"]
    leaves = variables["compand"]["layer"]
    weight = quantize_by_hand(params["layer"]["kernel"], leaves, "weight", bits=4)
    x64, weight, params, stats = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (x, weight, params, stats)
    )
    factor = params["norm"]["scale"] / np.sqrt(stats["var"] + 1e-5)
    expected = (x64 @ weight + params["layer"]["bias"] - stats["mean"]) * factor
    expected += params["norm"]["bias"]
    np.testing.assert_allclose(folded.apply(x), expected, atol=2e-5)


class Scanned(nn.Module):
    """Blocks with norms of their own, stacked."""

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            lambda module, x: nn.BatchNorm(**EVAL)(nn.Dense(4)(x)),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        return layers(self, x)


class Twice(nn.Module):
    """One layer before two norms."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        return nn.BatchNorm(**EVAL)(layer(nn.BatchNorm(**EVAL)(layer(x))))


REFUSED = {
    "after relu": (lambda: Normed(nn.Dense(6), (), "relu"), {}),
    "output is used besides": (lambda: Normed(nn.Dense(6), (), "skip"), {}),
    "two norms": (lambda: Normed(nn.Dense(6), (), "twice"), {}),
    "one layer twice": (Twice, {}),
    "quantized output": (lambda: Normed(nn.Dense(6)), {"act_site": "output", "act_bits": 4}),
    "weight in full precision": (
        lambda: nn.Sequential([Normed(nn.Dense(6)), nn.Dense(3)]),
        {"rules": (cj.Rule("layers_0/layer", weight_bits=None),)},
    ),
    "half precision": (lambda: Normed(nn.Dense(6, dtype=jnp.bfloat16)), {}),
    "features not last": (lambda: Normed(nn.DenseGeneral((2, 6))), {}),
    "einsum": (lambda: Normed(nn.Einsum((4, 6), "...d,dh->...h")), {}),
    "remat, a subclass": (lambda: Normed(nn.remat(nn.Dense)(6)), {}),
    "no norm": (Block, {}),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded(name):
    make, config = REFUSED[name]
    model, x = make(), normal(5, 4)
    qmodel = cj.quantize_model(model, cj.QuantConfig(**{"act_bits": None, **config}))
    if name == "quantized output":  # the last layer's is not: one more behind
        model = nn.Sequential([model, nn.Dense(3)])
        qmodel = cj.quantize_model(model, cj.QuantConfig(**config))
    variables = drawn(qmodel, x)
    with pytest.raises(ValueError, match="`fold_norms` must find a batch norm that sees a quant"):
        cj.freeze(qmodel, variables, x, fold_norms=True)


def test_stacked_norms_are_not_folded():
    qmodel, x = cj.quantize_model(Scanned(), cj.QuantConfig()), normal(3, 5, 4)
    with pytest.raises(ValueError, match="`fold_norms` must find a batch norm"):
        cj.freeze(qmodel, drawn(qmodel, x), x, fold_norms=True)


def test_in_evaluation_alone():
    qmodel, x = cj.quantize_model(NormedNet(), cj.QuantConfig()), normal(5, 4)
    variables = drawn(qmodel, x)
    with pytest.raises(ValueError, match="`fold_norms` must find a batch norm"):
        cj.freeze(qmodel, variables, x, train=True, fold_norms=True)
    folded = cj.freeze(qmodel, variables, x, train=False, fold_norms=True)
    with pytest.raises(ValueError, match="batch norm 'norm' is folded, so it must run in evalu"):
        folded.apply(x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    variables["batch_stats"]["norm"]["var"] = jnp.full(6, jnp.nan)
    with pytest.raises(ValueError, match="must be finite, batch norm 'norm' is not"):
        cj.freeze(qmodel, variables, x, train=False, fold_norms=True)


def test_a_file_with_folded_norms_of_another_model(tmp_path):
    _, folded, _ = frozen_twice(Normed(nn.Dense(6)), normal(5, 4))
    folded.save(tmp_path / "folded.safetensors")

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="layer")(x)

    with pytest.raises(ValueError, match="of shape None, not \\(6,\\)"):
        cj.load_frozen(tmp_path / "folded.safetensors", Other())
