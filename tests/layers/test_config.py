"""What a configuration and its rules accept, inherit and refuse."""

import dataclasses
import importlib.util
import sys
from importlib.machinery import SourceFileLoader

import pytest

import compand_jax as cj

pytestmark = pytest.mark.quick


def _plain_module():
    """Returns the module as it is outside pytest: no beartype, so that a bits=2.5 gets that far."""
    path = importlib.import_module("compand_jax.layers.config").__file__
    loader = SourceFileLoader("plain_config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


plain = _plain_module()


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, True, "4"])
@pytest.mark.parametrize("make", [plain.QuantConfig, lambda **kwargs: plain.Rule("a", **kwargs)])
@pytest.mark.parametrize("name", ["weight_bits", "act_bits"])
def test_bits(make, name, bits):
    with pytest.raises(ValueError, match=rf"`{name}` must be an integer from 1 to 8, got {bits!r}"):
        make(**{name: bits})


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("mu_scope", "layer", "single, separate, per_layer"),
        ("quantizer", "mulaw", "mu_law, uniform, power.*"),
        ("weight_granularity", "row", "tensor, channel"),
        ("act_site", "inputs", "input, output"),
        ("scale_gradient", "LSQ", "plain, lsq"),
        ("mu_gradient", "LSQ", "plain, lsq"),
        ("grid", "mid-tread", "midtread, midrise"),
        ("mu_scope", None, "single, separate, per_layer"),
        ("mu_scope", "", "single, separate, per_layer"),
    ],
)
def test_unknown_choices(field, value, choices):
    with pytest.raises(ValueError, match=rf"`{field}` must be one of {choices}, got {value!r}"):
        plain.QuantConfig(**{field: value})


@pytest.mark.parametrize("make", [plain.QuantConfig, lambda **kwargs: plain.Rule("a", **kwargs)])
def test_weight_standardization_is_on_or_off(make):
    with pytest.raises(ValueError, match="`weight_standardization` must be True or False, got 1"):
        make(weight_standardization=1)


def test_weight_standardization_takes_one_scale():
    match = "`weight_standardization` must go with weight_granularity='tensor', got 'channel'"
    with pytest.raises(ValueError, match=match):
        cj.QuantConfig(weight_standardization=True, weight_granularity="channel")
    rule = cj.Rule("a", weight_granularity="channel")
    with pytest.raises(ValueError, match=rf"`rules`: at 'a', {match}"):
        cj.QuantConfig(weight_standardization=True, rules=(rule,))


@pytest.mark.parametrize("field", ["quantizer", "weight_granularity", "grid"])
def test_unknown_choices_of_a_rule(field):
    with pytest.raises(ValueError, match=rf"`{field}` must be one of inherit, .*, got 'none'"):
        plain.Rule("a", **{field: "none"})


@pytest.mark.parametrize("mu", [-1e-3, 256.0, float("nan"), float("inf")])
def test_mu_init(mu):
    with pytest.raises(ValueError, match=r"`mu_init` must be from 0 to 255, got "):
        plain.QuantConfig(mu_init=mu)


def test_act_signed():
    with pytest.raises(ValueError, match=r"`act_signed` must be True, False or None, got 'yes'"):
        plain.QuantConfig(act_signed="yes")


@pytest.mark.parametrize("rules", [("conv",), (plain.Rule("a"), None)])
def test_rules_are_rules(rules):
    with pytest.raises(ValueError, match=r"`rules` must be a tuple of Rule objects, got "):
        plain.QuantConfig(rules=rules)


@pytest.mark.parametrize("pattern", ["(", "*", "[a"])
def test_a_pattern_is_a_regular_expression(pattern):
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression, got '.*': "):
        plain.Rule(pattern)


def test_a_pattern_is_a_string():
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression, got 3"):
        plain.Rule(3)


def test_one_bit_needs_midrise_or_no_sign():
    with pytest.raises(ValueError, match=r"`weight_bits` must be at least 2 .* got 1: .*midrise"):
        plain.QuantConfig(weight_bits=1)
    with pytest.raises(ValueError, match=r"`act_bits` must be at least 2 .* got 1: .*signed=False"):
        plain.QuantConfig(act_bits=1, act_signed=True)
    with pytest.raises(ValueError, match=r"`weight_bits` must be at least 2"):
        plain.Rule("a", weight_bits=1, grid="midtread")
    assert plain.QuantConfig(weight_bits=1, grid="midrise").weight_bits == 1
    assert plain.QuantConfig(act_bits=1, act_signed=False).act_bits == 1
    assert plain.QuantConfig(act_bits=1).act_bits == 1  # calibration may find that there is no sign


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"grid": "midtread"}, {"weight_bits": 1}),
        ({"grid": "midrise", "weight_bits": 1}, {"grid": "midtread"}),
        ({"act_signed": True}, {"act_bits": 1}),
    ],
)
def test_a_rule_that_does_not_go_with_the_config_is_refused_at_once(config, rule):
    with pytest.raises(ValueError, match=r"`rules`: at 'conv', `(weight|act)_bits` must be"):
        plain.QuantConfig(**config, rules=(plain.Rule("conv", **rule),))


def test_a_rule_inherits_what_it_leaves_out():
    config = cj.QuantConfig(
        weight_bits=3,
        grid="midrise",
        mu_scope="single",
        rules=(
            cj.Rule("head", weight_bits=8),
            cj.Rule("conv.*", act_bits=None, quantizer="uniform", weight_granularity="channel"),
        ),
    )
    head, conv = config.at("head"), config.at("conv_1")
    assert (head.weight_bits, head.act_bits, head.grid, head.quantizer) == (
        8,
        4,
        "midrise",
        "mu_law",
    )
    assert (conv.weight_bits, conv.act_bits, conv.quantizer) == (3, None, "uniform")
    assert conv.weight_granularity == "channel"
    assert (head.mu_scope, conv.mu_scope) == ("single", "single")


def test_rules_match_whole_names_and_the_first_wins():
    first, second = cj.Rule("a.*", weight_bits=2), cj.Rule("ab|b", weight_bits=3)
    config = cj.QuantConfig(rules=(first, second))
    sites = ("ab", "b", "bb", "xa", "", "a/b")
    found = {site: config.at(site).weight_bits for site in sites}
    assert found == {"ab": 2, "b": 3, "bb": 4, "xa": 4, "": 4, "a/b": 2}
    assert config.rule_for("b") is second
    assert config.rule_for("bb") is None
    assert cj.QuantConfig(rules=(cj.Rule("", weight_bits=2),)).at("").weight_bits == 2


def test_configs_are_values():
    a, b = (cj.QuantConfig(rules=(cj.Rule("x", act_bits=None),)) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != cj.QuantConfig()
    rule = plain.Rule("x", act_bits=None)
    assert plain.QuantConfig(rules=[rule]) == plain.QuantConfig(rules=(rule,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.weight_bits = 3
    assert dataclasses.replace(a, weight_bits=2).rules == a.rules
