"""The table of sites, number by number."""

import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from small_models import NormedNet, SetUp, Stack, drawn, normal

import compand_jax as cj

X = normal(5, 4)
HEADER = [
    "site", "weight bits", "weight mu", "weight scale", "SQNR dB", "bytes", "float32 bytes",
    "act bits", "act mu", "act scale", "act signed", "bits/weight",
]  # fmt: skip


def table(qmodel, variables):
    """Returns {site: {column: text}} and what is listed as not quantized."""
    *lines, last = qmodel.summary(variables).splitlines()
    header, *rows = (re.split(r" {2,}", line.strip()) for line in lines)
    assert header == HEADER
    left = last.removeprefix("weights not quantized: ")
    assert left != last
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}, left.split(", ")


def decibels(kernel, mu, scale, bits, grid="midtread"):
    kernel = np.asarray(kernel, np.float64)
    quantized = oracle.fake_quantize(kernel, float(mu), np.asarray(scale), bits, True, grid)
    return 10 * np.log10(np.sum(kernel**2) / np.sum((kernel - quantized) ** 2))


@pytest.mark.quick
def test_a_row_for_every_site():
    rules = (cj.Rule("second", weight_bits=2, grid="midrise", act_bits=None),)
    config = cj.QuantConfig(weight_bits=3, act_bits=5, rules=rules)
    sites = {
        "first": cj.Site(3, 5, act_signed=False),
        "second": cj.Site(2, None, grid="midrise"),
    }
    qmodel = cj.quantize_model(SetUp(), config, sites=sites)
    variables = drawn(qmodel, X)
    rows, left = table(qmodel, variables)
    found = qmodel.quantizers(variables)
    assert list(rows) == ["first", "second"]
    assert left == ["none"]
    for site, bits, grid in (("first", 3, "midtread"), ("second", 2, "midrise")):
        mu, scale = found[site]["weight_mu"], found[site]["weight_scale"]
        kernel = variables["params"][site]["kernel"]
        assert rows[site]["weight bits"] == str(bits)
        assert float(rows[site]["weight mu"]) == pytest.approx(float(mu), rel=5e-3)
        assert float(rows[site]["weight scale"]) == pytest.approx(float(scale), rel=5e-3)
        sqnr = decibels(kernel, mu, scale, bits, grid)
        assert float(rows[site]["SQNR dB"]) == pytest.approx(sqnr, abs=0.06)
        assert rows[site]["bytes"] == str(-(-kernel.size * bits // 8))
        assert rows[site]["float32 bytes"] == str(4 * kernel.size)
    assert (rows["first"]["act bits"], rows["first"]["act signed"]) == ("5", "no")
    assert float(rows["first"]["act scale"]) == pytest.approx(
        float(found["first"]["act_scale"]), rel=5e-3
    )
    acts = {rows["second"][name] for name in HEADER if name.startswith("act")}
    assert acts == {"-"}


@pytest.mark.quick
def test_channels_are_a_range():
    config = cj.QuantConfig(weight_bits=3, weight_granularity="channel", quantizer="uniform")
    qmodel = cj.quantize_model(SetUp(), config)
    variables = drawn(qmodel, X)
    row = table(qmodel, variables)[0]["first"]
    scale = np.asarray(qmodel.quantizers(variables)["first"]["weight_scale"])
    low, high = map(float, row["weight scale"].split(".."))
    assert (low, high) == pytest.approx((scale.min(), scale.max()), rel=5e-3)
    sqnr = decibels(variables["params"]["first"]["kernel"], 0.0, scale, 3)
    assert float(row["SQNR dB"]) == pytest.approx(sqnr, abs=0.06)
    assert (row["weight mu"], row["act mu"], row["act signed"]) == ("0", "0", "yes")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bare_layer_and_its_own_type(dtype):
    model = nn.Dense(300, param_dtype=dtype)
    qmodel = cj.quantize_model(model, cj.QuantConfig(weight_bits=8, act_bits=None))
    variables = drawn(qmodel, normal(5, 200, dtype=dtype))
    row = table(qmodel, variables)[0]["(model)"]
    kernel, found = variables["params"]["kernel"], qmodel.quantizers(variables)[""]
    quantized = cj.fake_quantize(kernel, found["weight_mu"], found["weight_scale"], bits=8)
    kernel, quantized = np.float64(kernel), np.float64(quantized)
    sqnr = 10 * np.log10(np.sum(kernel**2) / np.sum((kernel - quantized) ** 2))
    assert float(row["SQNR dB"]) == pytest.approx(sqnr, abs=0.06)
    assert (row["bytes"], row["float32 bytes"]) == ("60000", "240000")


@pytest.mark.quick
def test_what_is_exact_has_no_noise():
    qmodel = cj.quantize_model(nn.Dense(2), cj.QuantConfig(quantizer="uniform", act_bits=None))
    params = {"kernel": jnp.asarray([[1.0, 0.0], [-1.0, 1.0]]), "bias": jnp.zeros(2)}
    variables = {"params": params, "compand": {"weight_scale": jnp.zeros(())}}
    assert table(qmodel, variables)[0]["(model)"]["SQNR dB"] == "inf"


class Recurrent(nn.Module):
    """With a cell whose weights do not come by, and an embedding in full precision."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 4, name="embed")(ids)
        x = nn.RNN(nn.OptimizedLSTMCell(4, name="cell"))(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


@pytest.mark.quick
def test_what_is_not_quantized_is_named():
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7
    rules = (cj.Rule("embed", weight_bits=None, act_bits=None),)
    qmodel = cj.quantize_model(Recurrent(), cj.QuantConfig(rules=rules))
    rows, left = table(qmodel, drawn(qmodel, ids))
    assert list(rows) == ["head"]
    cell = {f"cell/{a}{b}/kernel" for a in "ih" for b in "ifgo"}
    assert set(left) == cell | {"embed/embedding"}


@pytest.mark.quick
def test_activations_alone():
    qmodel = cj.quantize_model(NormedNet(), cj.QuantConfig(weight_bits=None))
    rows, left = table(qmodel, drawn(qmodel, X))
    assert left == ["first/kernel", "second/kernel"]
    assert rows["first"]["weight bits"] == rows["first"]["SQNR dB"] == "-"
    assert rows["first"]["float32 bytes"] == str(4 * 4 * 6)
    assert rows["first"]["act bits"] == "4"


class LowRank(nn.Dense):
    """A dense layer that adds a product of its own, of two more parameters."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        a = self.param("lora_a", normal, (x.shape[-1], 2))
        b = self.param("lora_b", normal, (2, self.features))
        return super().__call__(x) + x @ a @ b


class Heads(nn.Module):
    """Layers with parameters of their own in one place or another, and a bias of two axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 4), name="heads")(LowRank(4, name="a/b")(x))
        table = self.param("table", nn.initializers.normal(), (2, 4))
        return LowRank(3, name="last")(x * table[None])


@pytest.mark.quick
def test_what_a_quantized_layer_multiplies_by_itself_is_named():
    qmodel = cj.quantize_model(LowRank(3), cj.QuantConfig())
    rows, left = table(qmodel, drawn(qmodel, X))
    assert list(rows) == ["(model)"]
    assert left == ["lora_a", "lora_b"]
    qmodel = cj.quantize_model(Heads(), cj.QuantConfig())
    rows, left = table(qmodel, drawn(qmodel, X))
    assert list(rows) == ["a/b", "heads", "last"]
    assert left == ["a/b/lora_a", "a/b/lora_b", "last/lora_a", "last/lora_b", "table"]
    assert [rows[name]["float32 bytes"] for name in rows] == ["64", "128", "48"]


def merged(variables):
    product = variables["params"]["lora_a"] @ variables["params"]["lora_b"]
    return {"params": {"kernel": product, "bias": variables["params"]["bias"]}}


class Factors(nn.Module):
    """A layer whose kernel is computed from two parameters, which are none of its own."""

    @nn.compact
    def __call__(self, x):
        parameters = {
            name: self.param(name, nn.initializers.normal(), shape)
            for name, shape in {"lora_a": (4, 2), "lora_b": (2, 3), "bias": (3,)}.items()
        }
        return nn.Dense(3, parent=None).apply(merged({"params": parameters}), x)


@pytest.mark.quick
def test_what_a_weight_is_computed_from_is_not_named():
    qmodel = cj.quantize_model(Factors(), cj.QuantConfig())
    rows, left = table(qmodel, drawn(qmodel, X))
    assert list(rows) == ["(model)"]
    assert left == ["none"]


@pytest.mark.quick
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_stack_is_one_row(granularity):
    config = cj.QuantConfig(weight_bits=3, weight_granularity=granularity)
    qmodel = cj.quantize_model(Stack("scan"), config)
    variables = drawn(qmodel, X)
    rows, left = table(qmodel, variables)
    kernel = variables["params"]["stack"]["dense"]["kernel"]
    found = qmodel.quantizers(variables)["stack/dense"]
    sqnr = decibels(kernel, found["weight_mu"], found["weight_scale"], 3)
    assert float(rows["stack/dense"]["SQNR dB"]) == pytest.approx(sqnr, abs=0.06)
    assert rows["stack/dense"]["bytes"] == str(3 * 4 * 4 * 3 // 8)
    assert left == ["none"]


@pytest.mark.quick
def test_columns_line_up():
    qmodel = cj.quantize_model(SetUp(), cj.QuantConfig())
    lines = qmodel.summary(drawn(qmodel, X)).splitlines()[:-1]
    for column in HEADER[1:]:
        end = lines[0].index(column) + len(column)
        assert all(len(line) >= end and line[end - 1] != " " for line in lines), column
