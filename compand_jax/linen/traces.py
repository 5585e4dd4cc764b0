"""Keeping traces that `jax.jit` and `nn.jit` made at another time out of a call, and its own in.

A trace is kept from call to call, and from one of two equal modules to the other. One that was made
without an interceptor would skip it, one that was made with it would leak it. So both caches' keys
get a part that is never the same twice.
"""

import contextlib
import itertools

from flax.core import Scope
from jax.experimental.xla_metadata import set_xla_metadata

_tokens = itertools.count()


class _NeverTheSame:
    """An object whose hash is another one whenever it is asked for."""

    def __hash__(self) -> int:
        return next(_tokens)


def no_trace_from_before() -> contextlib.AbstractContextManager:
    """Returns a context in which `jax.jit` uses no trace that it made outside of it."""
    return set_xla_metadata(compand_jax=str(next(_tokens)))  # it is in the key of jit's caches


def trace_afresh(scope: Scope) -> None:
    """Keeps `nn.jit` inside a scope from using a trace of another call, or keeping its own."""
    # The key is a hash in which the scope's flags are, and those of a scope are its submodules'.
    if "compand_jax" not in scope.flags:
        scope.flags = scope.flags.copy({"compand_jax": _NeverTheSame()})
