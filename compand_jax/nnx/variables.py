"""The variables that hold mu and scale in their trainable form."""

from flax import nnx


class Quantizer(nnx.Variable):
    """What a quantizer learns: a `Mu` or a `Scale`.

    A filter of Flax takes it for both: `nnx.state(model, compand_jax.nnx.Quantizer)`.
    """


class Mu(Quantizer):
    """theta = log(1 + mu), float32: a scalar, or one for each layer of a stack.

    `compand_jax.mu_from_theta` gives mu.
    """


class Scale(Quantizer):
    """rho = log(scale), float32, of the scale's shape, with a stack's axes in front of it.

    `compand_jax.scale_from_rho` gives the scale.
    """
