"""Whether a model is the one that was frozen: it makes the same variables, and runs on those."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from compand_jax.frozen.expansion import Weights, run_expanded
from compand_jax.frozen.sample import Call, Signature
from compand_jax.frozen.tree import Arrays, flatten, join_path


def initial_shapes(model: nn.Module, call: Call) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the variables that `model.init` makes of a sample, by path."""

    def init(key: Array, arrays: list) -> Any:
        args, kwargs = call.with_arrays(arrays)
        return nn.meta.unbox(model.init(key, *args, method=call.method, **kwargs))

    variables = jax.eval_shape(init, jax.random.key(0), call.arrays())
    return {
        join_path((*path, *map(str, inside))): x.shape
        for path, leaf in flatten(variables)
        for inside, x in jax.tree_util.tree_leaves_with_path(leaf)
    }


def check_model(
    path: str | Path, model: nn.Module, weights: Weights, act_site: str, signature: Signature
) -> None:
    """Raises ValueError where a model is not the one that a file was made of.

    Args:
      path: Of the file.
      model: The Linen module.
      weights: The file's.
      act_site: The file's.
      signature: The file's, with the sample.
    """
    wrong = f"`model` must be the one that {path} was made of, got one "
    call, initial = signature.call, signature.initial
    assert call is not None
    if initial is not None:
        try:
            own = initial_shapes(model, call)
        except Exception as error:  # whatever a model of other inputs raises
            inputs = [(x.shape, x.dtype.name) for x in call.arrays()]
            raise ValueError(
                f"{wrong}that does not take its inputs {inputs}: {line(error)}"
            ) from error
        for name in sorted(own.keys() | initial.keys()):
            if own.get(name) != initial.get(name):
                raise ValueError(
                    f"{wrong}with {name} of shape {own.get(name)}, not {initial.get(name)}"
                )

    try:
        run_abstractly(model, weights, act_site, call)
    except Exception as error:  # whatever a model of other variables raises
        raise ValueError(f"{wrong}that does not run on its variables: {line(error)}") from error


def run_abstractly(model: nn.Module, weights: Weights, act_site: str, call: Call) -> None:
    """Runs a frozen model on a call, without computing anything; raises what that raises."""

    def run(call: Call) -> None:
        def expanded(arrays: Arrays, inputs: list, key: Array) -> None:
            args, options = call.options(inputs, key)
            run_expanded(model, Weights(weights.sites, arrays), act_site, args, options)

        jax.eval_shape(expanded, weights.arrays, call.arrays(), jax.random.key(0))

    call.as_it_runs(run)


def line(error: Exception) -> str:
    """Returns the first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
