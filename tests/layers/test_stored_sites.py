"""Sites as JSON and back, everything broken in it, and a config that contradicts them."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY, SetUp, Tokens, drawn, normal

import compand_jax as cj

pytestmark = [
    pytest.mark.filterwarnings("ignore:the quantized model is not calibrated"),
]
X = normal(5, 4)
FIELDS = {
    "weight_bits": 4,
    "act_bits": 8,
    "quantizer": "uniform",
    "grid": "midrise",
    "scale_axes": [-2, -1],
    "act_signed": False,
    "act_site": "output",
}


def untyped(function):
    """Returns the function without the types that the tests check: users have none."""
    return getattr(function, "__wrapped__", function)


@functools.cache
def calibrated(**config):
    config = {"weight_bits": 3, "act_bits": 3, **config}
    qmodel = cj.quantize_model(SetUp(), cj.QuantConfig(**config))
    return qmodel.calibrate(drawn(SetUp(), X), [X], calibration="absmax")


@pytest.mark.quick
def test_sites_survive_json():
    sites = {
        "": cj.Site(4, None),
        "a/b": cj.Site(2, 8, "uniform", "midrise", (-2, -1), act_signed=False, act_site="output"),
        'quote" and \\ and ä': cj.Site(1, 1, grid="midrise", act_signed=False),
    }
    text = cj.sites_to_json(sites)
    for stored in (text, text.encode()):
        loaded = cj.sites_from_json(stored)
        assert loaded == sites
        assert list(map(hash, loaded.values())) == list(map(hash, sites.values()))


@pytest.mark.quick
def test_what_the_text_holds():
    text = cj.sites_to_json({"a": cj.Site(4, 8, "uniform", "midrise", (-2, -1), False, "output")})
    assert json.loads(text) == {"a": FIELDS | {"weight_standardization": False}}


@pytest.mark.quick
def test_sites_stored_before_there_was_standardization():
    site = cj.sites_from_json(json.dumps({"a": FIELDS}))["a"]
    assert site.act_site == "output"
    assert not site.weight_standardization


@pytest.mark.quick
def test_bits_may_be_numpys_integers():
    site = cj.Site(4, None)
    object.__setattr__(site, "weight_bits", np.int64(4))  # as without the tests' types
    assert cj.sites_from_json(cj.sites_to_json({"a": site})) == {"a": cj.Site(4, None)}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("act_site", ["input", "output"])
def test_a_model_by_its_stored_sites_is_the_same(granularity, act_site):
    qmodel, variables = calibrated(weight_granularity=granularity, act_site=act_site)
    sites = cj.sites_from_json(cj.sites_to_json(qmodel.sites))
    again = cj.quantize_model(SetUp(), qmodel.config, sites=sites)
    assert again == qmodel
    assert hash(again) == hash(qmodel)
    np.testing.assert_array_equal(again.apply(variables, X), qmodel.apply(variables, X))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "`text` must be JSON that sites_to_json wrote: Expecting value"),
        ('{"a": {"weight_bits": 4', "`text` must be JSON that sites_to_json wrote: "),
        (b"\xff\xfe\xfd", "`text` must be JSON that sites_to_json wrote: .* decode"),
        ("[" * 100_000, "`text` must be JSON that sites_to_json wrote: .*recursion|nested"),
        ("9" * 10_000, "`text` must be JSON that sites_to_json wrote: Exceeds the limit"),
        ("[]", "`text` must be a JSON object of sites, got one of type list"),
        ("null", "`text` must be a JSON object of sites, got one of type NoneType"),
        ('{"a": 1, "a": 2}', "wrote: a name comes twice among a, a"),
        (
            '{"a": null}',
            "site 'a' must have the fields weight_bits, .*, weight_standardization, got None",
        ),
        ('{"a": {}}', "site 'a' must have the fields weight_bits, .*, got : give"),
    ],
)
def test_text_that_holds_no_sites(text, match):
    with pytest.raises(ValueError, match=match):
        cj.sites_from_json(text)


@pytest.mark.quick
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_or_unknown(name):
    fields = {key: value for key, value in FIELDS.items() if key != name}
    match = rf"site 'a' must have the fields weight_bits, .*, got {', '.join(fields)}: "
    with pytest.raises(ValueError, match=match):
        cj.sites_from_json(json.dumps({"a": fields}))
    with pytest.raises(ValueError, match=r"got weight_bits, .*, act_site, bias_bits: "):
        cj.sites_from_json(json.dumps({"a": FIELDS | {"bias_bits": 8}}))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weight_bits": 9}, "`weight_bits` must be an integer from 1 to 8, got 9"),
        ({"weight_bits": 4.0}, "`weight_bits` must be an integer from 1 to 8, got 4.0"),
        ({"weight_bits": True}, "`weight_bits` must be an integer from 1 to 8, got True"),
        ({"weight_bits": "4"}, "`weight_bits` must be an integer from 1 to 8, got '4'"),
        ({"weight_bits": 1, "grid": "midtread"}, "`weight_bits` must be at least 2"),
        ({"act_bits": 0}, "`act_bits` must be an integer from 1 to 8, got 0"),
        ({"act_bits": [4]}, "`act_bits` must be an integer from 1 to 8, got"),
        ({"act_bits": 1, "act_signed": True}, "`act_bits` must be at least 2 for activations"),
        ({"quantizer": "log"}, "`quantizer` must be one of mu_law, .*, got 'log'"),
        ({"quantizer": []}, r"`quantizer` must be one of mu_law, .*, got \[\]"),
        ({"grid": "mid"}, "`grid` must be one of midtread, midrise, got 'mid'"),
        ({"act_signed": 1}, "`act_signed` must be True or False, got 1"),
        ({"act_signed": None}, "`act_signed` must be True or False, got None"),
        ({"weight_standardization": 1}, "`weight_standardization` must be True or False, got 1"),
        ({"act_site": "both"}, "`act_site` must be one of input, output, got 'both'"),
        ({"scale_axes": [-1.0]}, r"`scale_axes` must be integers, got \[-1.0\]"),
        ({"scale_axes": [True]}, r"`scale_axes` must be integers, got \[True\]"),
        ({"scale_axes": [[-1]]}, r"`scale_axes` must be integers, got \[\[-1\]\]"),
        ({"scale_axes": "-1"}, r"`scale_axes` must be integers, got '-1'"),
        ({"scale_axes": None}, "`scale_axes` must be integers, got None"),
        ({"scale_axes": [0]}, r"`scale_axes` must be negative, and each of them once, got \[0\]"),
        ({"scale_axes": [-1, -1]}, r"`scale_axes` must be negative, .* once, got \[-1, -1\]"),
    ],
)
def test_a_field_out_of_its_range_is_named_with_its_site(changed, match):
    with pytest.raises(ValueError, match=f"site 'a/b': {match}"):
        cj.sites_from_json(json.dumps({"": FIELDS, "a/b": FIELDS | changed}))


def test_what_are_no_sites():
    qmodel, _ = calibrated()
    text, config = cj.sites_to_json(qmodel.sites), qmodel.config
    match = "`sites` must be a calibrated model's, got NoneType: calibrate it, or read"
    with pytest.raises(TypeError, match=match):
        untyped(cj.sites_to_json)(cj.quantize_model(SetUp(), config).sites)
    quantize = untyped(cj.quantize_model)
    with pytest.raises(TypeError, match="`sites` must be a calibrated model's, got str: "):
        quantize(SetUp(), config, sites=text)
    match = "`sites` must be Site objects by name, got dict at 'first': read them by sites_from"
    with pytest.raises(TypeError, match=match):
        quantize(SetUp(), config, sites=json.loads(text))


# A config that they were not calibrated with

CONTRADICTIONS = {
    "weight_bits": ({}, {"weight_bits": 4}, "weight_bits=3, the config has 4"),
    "no weight_bits": ({"weight_bits": None}, {}, "weight_bits=None, the config has 3"),
    "act_bits": ({}, {"act_bits": None}, "act_bits=3, the config has None"),
    "quantizer": ({}, {"quantizer": "uniform"}, "quantizer='mu_law', the config has 'uniform'"),
    "grid": ({}, {"grid": "midrise"}, "grid='midtread', the config has 'midrise'"),
    "act_site": ({}, {"act_site": "output"}, "act_site='input', the config has 'output'"),
    "act_site back": ({"act_site": "output"}, {}, "act_site='output', the config has 'input'"),
    "act_signed": ({}, {"act_signed": False}, "act_signed=True, the config has False"),
    "channels": (
        {"weight_granularity": "channel"},
        {},
        "weight_granularity='channel', the config has 'tensor'",
    ),
    "rule": ({}, {"rules": (cj.Rule("fi.*", act_bits=8),)}, "act_bits=3, the config has 8"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_sites_is_refused(name):
    own, other, match = CONTRADICTIONS[name]
    config = cj.QuantConfig(**{"weight_bits": 3, "act_bits": 3, **other})
    granularity = own.get("weight_granularity", "tensor")
    fields = {"weight_bits": 3, "act_bits": 3, **own}
    fields.pop("weight_granularity", None)
    site = cj.Site(**fields, scale_axes=(-1,) if granularity == "channel" else ())
    made_with = cj.QuantConfig(**{**fields, "weight_granularity": granularity})
    qmodel = cj.quantize_model(SetUp(), made_with, sites={"first": site, "second": site})
    match = f"`sites` must be of the same config, site 'first' was calibrated with {match}: give"
    with pytest.raises(ValueError, match=match):
        cj.quantize_model(SetUp(), config, sites=qmodel.sites)
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(qmodel, config=config)


@pytest.mark.quick
def test_what_says_nothing_about_sites_may_differ():
    qmodel, variables = calibrated()
    config = dataclasses.replace(qmodel.config, scale_gradient="lsq", mu_init=0.0, act_signed=True)
    again = cj.quantize_model(SetUp(), config, sites=qmodel.sites)
    np.testing.assert_array_equal(again.apply(variables, X), qmodel.apply(variables, X))


def test_activations_that_were_not_calibrated():
    qmodel, _ = calibrated(act_bits=None)
    config = dataclasses.replace(qmodel.config, act_bits=3)
    again = cj.quantize_model(SetUp(), config, sites=qmodel.sites)
    match = "site 'first' was calibrated without act_bits, the config has 3: calibrate again"
    with pytest.raises(ValueError, match=match):
        again.apply(again.init(KEY, X), X)


class LookUp(Tokens):
    """The same, whose look-up can be run alone."""

    def look_up(self, ids):
        return self(ids)

    @nn.compact
    def __call__(self, ids, attend=False):
        embed = nn.Embed(7, 6, name="embed")
        return embed.attend(embed(ids)) if attend else embed(ids)


@pytest.mark.quick
def test_an_embedding_calibrated_by_its_look_up_is_not_attended_to():
    ids = jnp.arange(5, dtype=jnp.int32)
    qmodel = cj.quantize_model(LookUp(), cj.QuantConfig())
    variables = drawn(LookUp(), ids)
    qmodel, variables = qmodel.calibrate(variables, [ids], calibration="absmax")
    assert qmodel.apply(variables, ids).shape == (5, 6)
    with pytest.raises(ValueError, match="site 'embed' was calibrated without act_bits"):
        qmodel.apply(variables, ids, attend=True)


@pytest.mark.parametrize("made_by", ["tensor", "channel"])
def test_variables_of_another_granularity(made_by):
    other = {"tensor": "channel", "channel": "tensor"}[made_by]
    _, variables = calibrated(weight_granularity=made_by)
    qmodel = cj.quantize_model(SetUp(), cj.QuantConfig(3, 3, weight_granularity=other))
    match = f"compand/first/weight_scale for weight_granularity='{other}', got one of shape "
    with pytest.raises(ValueError, match=match):
        qmodel.apply(variables, X)
