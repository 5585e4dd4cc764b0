"""A Linen model as a function of its parameters, in whose program its own contractions are found.

Its layers are intercepted while it is traced. What they multiply is marked, so that no contraction
of theirs is taken for one of a parameter.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from compand_jax.layers.contractions.program import Program, trace
from compand_jax.layers.visitor import Visitor
from compand_jax.linen.interception import intercept_layers


def trace_model(
    model: nn.Module,
    visitor: Visitor,
    variables: Mapping[str, Any],
    args: tuple,
    mutable: Any,
    kwargs: Mapping[str, Any],
    contractions: str,
) -> Program:
    """Returns a call of `model.apply` as a program, its layers shown to the visitor.

    `contractions` are those that are sites, as `QuantConfig` has them.
    """
    rest = dict(variables)
    boxed = rest.pop("params", {})

    def call(params: Any, rest: dict, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        params = nn.meta.replace_boxed(boxed, params)
        with intercept_layers(model, visitor, marks=True) as intercepted:
            return intercepted.apply({**rest, "params": params}, *args, mutable=mutable, **kwargs)

    # Flax opens a scope of this name for the model, which is in no path of its parameters.
    root = model.name or type(model).__name__
    given = rest, args, dict(kwargs)
    products = contractions == "all"
    return trace(call, nn.meta.unbox(boxed), given, {}, products=products, root=root)
