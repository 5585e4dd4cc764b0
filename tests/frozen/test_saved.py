"""Nothing is saved that does not load, and no file loads into another model than its own."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_files import saved_model
from small_models import KEY, NormedNet, Tokens, drawn, normal

import compand_jax as cj

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)
CONFIG = cj.QuantConfig(weight_bits=3, act_bits=3)


def saved_and_loaded(path, model, args, kwargs, variables=None):
    """Freezes, saves and loads a model, and returns both; their outputs are the quantized ones."""
    qmodel = cj.quantize_model(model, CONFIG)
    variables = qmodel.init(KEY, *args, **kwargs) if variables is None else variables
    frozen = cj.freeze(qmodel, variables, *args, **kwargs)
    frozen.save(path)
    loaded = cj.load_frozen(path, model)
    expected = jax.jit(lambda variables: qmodel.apply(variables, *args, **kwargs))(variables)
    for each in (frozen, loaded):
        np.testing.assert_array_equal(each.apply(*args, **kwargs), expected)
    return frozen, loaded


class Sum(nn.Module):
    """A dense layer on the sum of all numbers that it is given, whatever holds them."""

    @nn.compact
    def __call__(self, *args, **kwargs):
        numbers = [x for x in jax.tree.leaves((args, kwargs)) if not isinstance(x, str)]
        total = sum(jnp.asarray(x).astype(jnp.float32).sum() for x in numbers)
        return nn.Dense(3, name="dense")(jnp.stack([total, jnp.tanh(total)])[None])


TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "float16", "float32", "float64")  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_of_numpys_types(dtype, tmp_path):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    frozen, loaded = saved_and_loaded(tmp_path / "x.safetensors", Sum(), (x, x[0, 1]), {})
    types = [found.dtype for found in jax.tree.leaves(frozen.signature.call.args)]
    assert types == [jnp.asarray(x).dtype] * 2
    assert loaded.signature == frozen.signature


def test_ids_of_numpys_type(tmp_path):
    saved_and_loaded(tmp_path / "x.safetensors", Tokens(), (np.arange(5),), {})


ARGUMENTS = {
    "a number": (1.5,),
    "a flag": (True, None),
    "a dictionary": ({"x": np.ones(2), "y": {"z": [1, 2.5], "~/": "text"}},),
    "tuples and lists": ((1, (2, [np.float64(3), ()])),),
    "a number of jax": (jnp.bfloat16(1),),
    "none": (),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_of_any_kind_are_a_signature(kind, by_name, tmp_path):
    args = ARGUMENTS[kind]
    kwargs = {f"name{i}": x for i, x in enumerate(args)} if by_name else {}
    args = () if by_name else args
    path = tmp_path / "x.safetensors"
    frozen, loaded = saved_and_loaded(path, Sum(), (*args, 1), kwargs)
    assert loaded.signature == frozen.signature
    with pytest.raises(ValueError, match=re.escape("params/dense/bias of shape None, not (3,)")):
        cj.load_frozen(path, Wide())


class Wide(nn.Module):
    """Another model, which takes anything too."""

    @nn.compact
    def __call__(self, *args, **kwargs):
        return nn.Dense(3, use_bias=False, name="dense")(jnp.ones((1, 2)))


Pair = collections.namedtuple("Pair", "x y")


def test_a_sample_that_a_file_cannot_hold(tmp_path):
    qmodel, path = cj.quantize_model(Sum(), CONFIG), tmp_path / "x.safetensors"
    sample = Pair(normal(2), 3)
    variables = qmodel.init(KEY, sample)
    frozen = cj.freeze(qmodel, variables, sample)
    frozen.save(path)
    with pytest.raises(
        ValueError, match=r"`sample` must be what .* load_frozen\(path, model, \*sa"
    ):
        cj.load_frozen(path, Sum())
    with pytest.raises(ValueError, match="params/dense/bias of shape None, not"):
        cj.load_frozen(path, Wide(), sample)
    loaded = cj.load_frozen(path, Sum(), sample)
    np.testing.assert_array_equal(loaded.apply(sample), frozen.apply(sample))
    with pytest.raises(ValueError, match="`sample` must be the arguments of the model's __call__"):
        cj.load_frozen(path, NormedNet(), sample, 1, 2, 3)


class Methods(nn.Module):
    """A model with a method of its own, and a cache that a call makes shorter than `init`."""

    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(3)
        self.attention = nn.MultiHeadDotProductAttention(2, decode=True)

    def __call__(self, x):
        return self.second(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.first(x))

    def decode(self, x):
        return self.attention(x)


@pytest.mark.parametrize("method", ["encode", Methods.encode])
def test_a_method(method, tmp_path):
    qmodel, x = cj.quantize_model(Methods(), CONFIG), normal(5, 4)
    variables = drawn(qmodel, x)
    _, loaded = saved_and_loaded(
        tmp_path / "x.safetensors", Methods(), (x,), {"method": method}, variables
    )
    np.testing.assert_array_equal(loaded.apply(x), jax.jit(qmodel.apply)(variables, x))


def test_a_cache_that_is_longer_than_the_sample(tmp_path):
    qmodel, x = cj.quantize_model(Methods(), CONFIG), normal(2, 6, 4)
    variables = qmodel.init(KEY, x, method="decode")
    options = {"method": "decode", "mutable": ["cache"]}
    step = jax.jit(lambda variables, x: qmodel.apply(variables, x, **options))
    expected, _ = step(variables, x[:, :1])
    frozen = cj.freeze(qmodel, variables, x[:, :1], method="decode")
    frozen.save(tmp_path / "x.safetensors")
    loaded = cj.load_frozen(tmp_path / "x.safetensors", Methods())
    found, state = loaded.apply(x[:, :1], **options)
    np.testing.assert_array_equal(found, expected)
    assert state["cache"]["attention"]["cached_key"].shape[1] == 6


def test_no_model(tmp_path):
    path, *_ = saved_model(tmp_path / "x.safetensors")
    for model, got in ((NormedNet, "the class NormedNet"), (None, "NoneType"), ("x", "str")):
        with pytest.raises(ValueError, match=f"the Flax module that was frozen, got {got}: make"):
            cj.load_frozen(path, model)
    for model in (Sum(), nn.Dense(6), nn.Sequential([]), Tokens()):
        with pytest.raises(
            ValueError, match="`model` must be the one that .* was made of"
        ) as found:
            cj.load_frozen(path, model)
        assert "\n" not in str(found.value)


class Kept(nn.Module):
    """A model with a variable of any kind."""

    @nn.compact
    def __call__(self, x):
        kept = self.variable("state", "kept", lambda: None).value
        y = nn.Dense(3, name="dense")(x)
        return y + kept[0].astype(y.dtype).sum() if isinstance(kept, tuple) else y


@pytest.mark.parametrize("value", [(jnp.ones(2), jnp.ones(3)), jax.random.key(0), jnp.int8(1)])
def test_variables_that_no_file_holds(value, tmp_path):
    qmodel, x = cj.quantize_model(Kept(), CONFIG), normal(5, 4)
    variables = {**drawn(cj.quantize_model(Kept(), CONFIG), x), "state": {"kept": value}}
    frozen = cj.freeze(qmodel, variables, x)
    np.testing.assert_array_equal(frozen.apply(x), jax.jit(qmodel.apply)(variables, x))
    with pytest.raises(ValueError, match="`variables` must be of float32, .* in state/kept: conv"):
        frozen.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_does_not_load_is_not_written(tmp_path, monkeypatch):
    path, frozen, _ = saved_model(tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="`info` must be what JSON can hold"):
        frozen.save(path, info={"x": object()})
    with pytest.raises(ValueError, match="a name twice in its JSON"):
        frozen.save(path, info={"x": {1: "one", "1": "two"}})
    monkeypatch.setattr("compand_jax.frozen.packing.pack", None)
    monkeypatch.setattr("compand_jax.frozen.description._as_stored", lambda x: np.float32(x))
    with pytest.raises(ValueError, match="codes of site 'first' not in bytes"):
        frozen.save(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]
