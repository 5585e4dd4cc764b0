"""The variables that hold mu and scale in their trainable form, and what stands for them frozen."""

from flax import nnx


class Quantizer(nnx.Variable):
    """What a quantizer has: a `Mu` and a `Scale`, which it learns; in a frozen model the rest.

    A filter of Flax takes it for all: `nnx.state(model, compand_jax.nnx.Quantizer)`.
    """


class Mu(Quantizer):
    """theta = log(1 + mu), float32: a scalar, or one for each layer of a stack.

    `compand_jax.mu_from_theta` gives mu. Of another family of levels it is that one's theta, behind
    a stack's axes.
    """


class Scale(Quantizer):
    """rho = log(scale), float32, of the scale's shape, with a stack's axes in front of it.

    `compand_jax.scale_from_rho` gives the scale.
    """


class Codes(Quantizer):
    """The codes of a frozen weight, packed: uint8 [bytes], with a stack's axes in front.

    They are those of `compand_jax.quantize`, counted from the lowest level.
    """


class Table(Quantizer):
    """Levels, thresholds or scales of a frozen layer, with a stack's axes in front."""
