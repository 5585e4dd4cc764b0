"""What to quantize and how, as frozen dataclasses that can be hashed, compared and written as JSON.

Every argument is checked when the object is made, so that a wrong one is an error before a
model is touched.
"""

import dataclasses
import numbers
import re
from typing import Any, Literal

from compand_jax.core.families.registry import family_names, family_of
from compand_jax.core.spec import GRIDS, ONE_BIT_REMEDY, check_spec

MU_SCOPES = ("single", "separate", "per_layer")
GRANULARITIES = ("tensor", "channel")
SCALE_DTYPES = ("float32", "float16", "uint8")
ACT_SITES = ("input", "output")
GRADIENTS = ("plain", "lsq")
CONTRACTIONS = ("layers", "parameters", "all")

INHERIT = "inherit"
Inherit = Literal["inherit"]


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError where `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}: choose one")


def check_weights(bits: Any, grid: str, quantizer: str = "mu_law") -> None:
    """Raises ValueError where weights cannot be quantized to these bits on this grid."""
    require_choice("grid", grid, GRIDS)
    family_of(quantizer)
    if bits is not None:
        _named("weight_bits", "grid='midrise'", check_spec, bits, True, grid, quantizer)


def check_acts(bits: Any, signed: bool | None) -> None:
    """Raises ValueError where activations cannot be quantized to these bits; None is unknown."""
    if signed is not None and not isinstance(signed, bool):
        raise ValueError(f"`act_signed` must be True, False or None, got {signed!r}: choose one")
    # Where calibration decides, one bit may be unsigned, so only the range is known here.
    if bits is not None:
        _named("act_bits", "act_signed=False", check_spec, bits, bool(signed), "midtread")


def check_group_size(name: str, size: Any) -> None:
    """Raises ValueError where this is no number of inputs that can share a scale."""
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(
            f"`{name}` must be a number of inputs, 1 at least, got {size!r}: 64 gives every 64 "
            "inputs a scale"
        )


def _check_granularity(config: Any, *more: str) -> None:
    """Raises ValueError where a granularity is none; makes NumPy's integers Python's."""
    value = config.weight_granularity
    if isinstance(value, numbers.Real):
        check_group_size("weight_granularity", value)
        object.__setattr__(config, "weight_granularity", int(float(value)))
    else:
        require_choice("weight_granularity", value, (*more, *GRANULARITIES))


def _check_standardization(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(
            f"`weight_standardization` must be True or False, got {value!r}: choose one"
        )


def _named(name: str, remedy: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        text = str(error).replace("`bits`", f"`{name}`")
        raise ValueError(text.replace(ONE_BIT_REMEDY, remedy)) from None


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception to a `QuantConfig` for the sites whose name matches a regular expression.

    A site is a layer. Its name is its path in the model, "/".join(module.path), such as
    "block1/conv2"; the model itself is "". The first rule that matches a site's whole name wins.
    A field that a rule leaves out keeps the config's value.

    Args:
      pattern: Regular expression for the whole name, as in `re.fullmatch`.
      weight_bits: Bits per weight, 1 to 8. None is full precision.
      act_bits: Bits per activation, 1 to 8. None is full precision.
      quantizer: As in `QuantConfig`.
      grid: The weights' grid, "midtread" or "midrise".
      weight_granularity: "tensor", "channel", or a group size.
      weight_standardization: True or False.

    Raises:
      ValueError: a field is out of its range, or the pattern is no regular expression.

    >>> Rule("conv1|dense", weight_bits=8, act_bits=8).pattern
    'conv1|dense'
    """

    pattern: str
    weight_bits: int | Inherit | None = INHERIT
    act_bits: int | Inherit | None = INHERIT
    quantizer: str = INHERIT
    grid: str = INHERIT
    weight_granularity: str | int = INHERIT
    weight_standardization: bool | Inherit = INHERIT

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`pattern` must be a regular expression, got {self.pattern!r}: {error}"
            ) from None
        for name, choices in (
            ("quantizer", family_names()),
            ("grid", GRIDS),
        ):
            require_choice(name, getattr(self, name), (INHERIT, *choices))
        _check_granularity(self, INHERIT)
        if self.weight_standardization != INHERIT:
            _check_standardization(self.weight_standardization)
        # The grid that a rule's bits go with may be the config's, which checks them together.
        if self.weight_bits != INHERIT:
            check_weights(self.weight_bits, "midrise" if self.grid == INHERIT else self.grid)
        if self.act_bits != INHERIT:
            check_acts(self.act_bits, None)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model's weights and activations are quantized.

    Args:
      weight_bits: Bits per weight, 1 to 8; 1 needs the grid "midrise". None is full precision.
      act_bits: Bits per activation, 1 to 8; 1 needs activations without a sign. None is full
        precision.
      mu_scope: Which tensors share a mu, or another family's parameters. "single": all of them.
        "separate": all weights share one, and all activations another. "per_layer": each layer has
        one for its weight and one for its activation.
      quantizer: The family of levels, which learns a scale and: "mu_law", mu; "uniform" nothing;
        "power", an exponent; "normal_float" and "apot", nothing; "piecewise", 16 slopes; "free",
        every level. `register_quantizer` adds others.
      weight_granularity: "tensor" gives a kernel one scale, "channel" one per output channel. A
        number, such as 64, gives each output channel one per so many inputs that follow each other
        in memory; it divides their number. Inputs are the axes that are summed over: of a
        convolution its input channels, at each place of the window; of an Embed the features, as
        in its `attend`.
      grid: The weights' grid. "midtread" has a level at zero, "midrise" has none. Activations are
        always midtread.
      act_site: Which activations are quantized: each layer's "input", or its "output" before the
        norm. The last layer's output stays in full precision.
      act_signed: Whether activations can be negative. None lets calibration decide, site by site.
      scale_gradient: "plain" leaves the scales' gradients as they are. "lsq" multiplies them by
        1/sqrt(n M), with the tensor's size n and the M of its grid (Esser et al., "Learned step
        size quantization", ICLR 2020, section 2.2). n counts all devices, except where JAX does
        not track what differs between them (`jax.pmap`, `check_vma=False`).
      mu_gradient: "plain" or "lsq", likewise of every mu.
      weight_standardization: Whether a weight is quantized in units of its own standard deviation,
        m + s Q((w - m)/s), with the mean m and the deviation s of each layer's weight, which carry
        gradients. Its scale then counts standard deviations. It takes one scale to a weight. As
        APoT, LCQ and nuLSQ do it, but that they leave out the mean, which a network that was
        trained with it cannot spare.
      scale_dtype: What the scales of a weight are stored in, where it has several: "float32",
        "float16", or "uint8", multiples of one further scale. The model computes with the rounded
        ones, so that a frozen one does the same.
      mu_init: The mu that `init` sets, 0 to 255. Calibration replaces it. Other families start
        with uniform levels.
      contractions: What is a site beside Flax's own layers. "layers": nothing else. "parameters":
        every contraction of a parameter that is in no such layer, as by `jnp.einsum`, `@` or
        `jax.lax.conv_general_dilated`; its name is the parameter's path, such as "block/w". "all":
        also those of two activations, as in attention; their names are "block/product_0:left" and
        "block/product_0:right", counted in the order of the program. A function has no layers, and
        "layers" is the same as "parameters" for it.
      rules: Exceptions by site name. The first `Rule` that matches wins.

    Raises:
      ValueError: a field is out of its range, or a rule does not go with the other fields.

    >>> QuantConfig(weight_bits=3, mu_scope="single").act_bits
    4
    """

    weight_bits: int | None = 4
    act_bits: int | None = 4
    mu_scope: str = "per_layer"
    quantizer: str = "mu_law"
    weight_granularity: str | int = "tensor"
    grid: str = "midtread"
    act_site: str = "input"
    act_signed: bool | None = None
    scale_gradient: str = "plain"
    mu_gradient: str = "plain"
    weight_standardization: bool = False
    scale_dtype: str = "float32"
    mu_init: float = 2.0
    contractions: str = "layers"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (
            ("mu_scope", MU_SCOPES),
            ("quantizer", family_names()),
            ("act_site", ACT_SITES),
            ("scale_gradient", GRADIENTS),
            ("mu_gradient", GRADIENTS),
            ("scale_dtype", SCALE_DTYPES),
            ("contractions", CONTRACTIONS),
        ):
            require_choice(name, getattr(self, name), choices)
        _check_granularity(self)
        check_weights(self.weight_bits, self.grid, self.quantizer)
        if self.mu_scope != "per_layer" and not family_of(self.quantizer).is_shared:
            raise ValueError(
                f"`mu_scope` must be 'per_layer' for quantizer={self.quantizer!r}, got "
                f"{self.mu_scope!r}: how many levels there are depends on bits and sign"
            )
        check_acts(self.act_bits, self.act_signed)
        _check_standardization(self.weight_standardization)
        if self.weight_standardization and self.weight_granularity != "tensor":
            raise ValueError(
                "`weight_standardization` must go with weight_granularity='tensor', got "
                f"{self.weight_granularity!r}: it has one mean and deviation to a weight"
            )
        if not isinstance(self.mu_init, numbers.Real) or not 0 <= self.mu_init <= 255:
            raise ValueError(
                f"`mu_init` must be from 0 to 255, got {self.mu_init!r}: 0 has uniform levels"
            )
        if not isinstance(self.rules, tuple | list) or not all(
            isinstance(rule, Rule) for rule in self.rules
        ):
            raise ValueError(
                f"`rules` must be a tuple of Rule objects, got {self.rules!r}: give (Rule(...),)"
            )
        object.__setattr__(self, "rules", tuple(self.rules))  # a list is as good, unhashed
        for rule in self.rules:
            self._with(rule)

    def rule_for(self, site: str) -> Rule | None:
        """Returns the first rule that matches the site's whole name, or None."""
        return next((rule for rule in self.rules if re.fullmatch(rule.pattern, site)), None)

    def at(self, site: str) -> "QuantConfig":
        """Returns this config as it is for one site, its rule applied.

        >>> QuantConfig(rules=(Rule("head", weight_bits=8),)).at("head").weight_bits
        8
        """
        rule = self.rule_for(site)
        return self if rule is None else self._with(rule)

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized anywhere, as far as bits and rules tell."""
        bits = {self.act_bits, *(rule.act_bits for rule in self.rules)}
        return bool(bits - {None, INHERIT})

    def _with(self, rule: Rule) -> "QuantConfig":
        fields = {**dataclasses.asdict(rule), "rules": ()}
        pattern = fields.pop("pattern")
        try:
            return dataclasses.replace(
                self, **{name: value for name, value in fields.items() if value != INHERIT}
            )
        except ValueError as error:
            raise ValueError(f"`rules`: at {pattern!r}, {error}") from None


def require_config(config: Any) -> None:
    """Raises TypeError where this is no `QuantConfig`."""
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"`config` must be a QuantConfig, got {type(config).__name__}: give QuantConfig(...)"
        )
