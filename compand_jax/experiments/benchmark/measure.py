"""What quantization costs: a training step or an evaluation, next to full precision.

A case is one compiled training step of a network at a batch size, by one method, or an evaluation
from its packed codes. The cases of a network are measured in turns, so that a machine that gets
slower slows all of them: what is reported is each repetition's ratio to full precision in that
repetition.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from compand_jax.core.quantizers import fake_quantize
from compand_jax.data.images import ImageData
from compand_jax.experiments.errors import UserError
from compand_jax.frozen.freeze import freeze
from compand_jax.frozen.model import FrozenModel
from compand_jax.layers.config import QuantConfig
from compand_jax.layers.partition import partition_optimizer
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model
from compand_jax.models import create_model
from compand_jax.models.layers import ConvSpec, classify, conv_stack
from compand_jax.training.fit import FitConfig, fit
from compand_jax.training.metrics_log import read_log
from compand_jax.training.steps import TrainState, create_state, train_step

FULL = "full precision"
MU_LAW = "mu-law W4A4"
QWIX = "qwix int8"
METHODS: Mapping[str, QuantConfig | None] = {
    FULL: None,
    MU_LAW: QuantConfig(weight_bits=4, act_bits=4, mu_scope="per_layer"),
    "mu-law W8A8": QuantConfig(weight_bits=8, act_bits=8, mu_scope="per_layer"),
    "uniform W4A4": QuantConfig(weight_bits=4, act_bits=4, quantizer="uniform"),
    QWIX: None,
}
FROZEN: Mapping[str, QuantConfig | None] = {
    FULL: None,
    "frozen mu-law W4": QuantConfig(weight_bits=4, act_bits=None, mu_scope="per_layer"),
    "frozen mu-law W4A4": QuantConfig(weight_bits=4, act_bits=4, mu_scope="per_layer"),
}
Call = Callable[[], Any]
_CLASSES = 10
_IMAGE = (32, 32, 3)


class Problem(NamedTuple):
    """A network as a method has it, its optimizer, its state and a batch of noise."""

    model: Any
    tx: optax.GradientTransformation
    state: TrainState
    images: jax.Array
    labels: jax.Array


class Case(NamedTuple):
    """A compiled function; `run` calls it once."""

    run: Call
    seconds: float
    temp_bytes: int


class Plain(nn.Module):
    """Four convolutions with batch norm, of `width` times 16 features, for the curve of width."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits [batch, 10] of images x [batch, h, w, c]."""
        specs = [ConvSpec(16 * self.width, pool=i % 2 == 1) for i in range(4)]
        x = conv_stack(
            x, specs, norm="batch", block_order="conv_norm_act", dtype=jnp.float32, train=train
        )
        return classify(x, _CLASSES, jnp.float32)


def make_network(name: str) -> nn.Module:
    """Returns a network of the zoo, or `plain-WIDTH`."""
    family, _, width = name.partition("-")
    return Plain(int(width)) if family == "plain" else create_model(name, _CLASSES)


def quantized(model: nn.Module, method: str, config: QuantConfig | None) -> Any:
    """Returns the network as a method has it.

    Raises:
      UserError: the method is qwix's and qwix is not installed.
    """
    if method != QWIX:
        return model if config is None else quantize_model(model, config)
    try:
        import qwix  # pyright: ignore[reportMissingImports]  # of an extra
    except ImportError as error:
        raise UserError(
            "`methods` must be installed, got qwix int8 without qwix: pip install -e '.[bench]', "
            "or leave it out"
        ) from error
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def make_problem(
    network: str, batch: int, method: str, config: QuantConfig | None = None
) -> Problem:
    """Returns a network to be trained by one of `METHODS`, or by a configuration.

    Weights are trained by SGD with momentum, mu and scale by Adam.
    """
    plain = make_network(network)
    images = jax.random.normal(jax.random.key(0), (batch, *_IMAGE))
    variables = dict(jax.jit(plain.init)(jax.random.key(1), images[:1]))
    config = config or METHODS[method]
    model, tx = quantized(plain, method, config), optax.sgd(0.01, 0.9)
    if isinstance(model, QuantizedModel):
        model, variables = model.calibrate(variables, [images[:8]], calibration="absmax")
        tx = partition_optimizer(weights=tx, mu=optax.adam(1e-3), scale=optax.adam(1e-3))
    state = create_state(variables, tx, jax.random.key(2))
    return Problem(model, tx, state, images, jnp.arange(batch) % _CLASSES)


def compile_step(problem: Problem) -> Case:
    """Returns the compiled training step, with the time that tracing and compiling it took."""
    step = functools.partial(train_step, model=problem.model, tx=problem.tx)
    return _compile(step, problem.state, problem.images, problem.labels)


def _compile(function: Callable, *arguments: Any) -> Case:
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return Case(functools.partial(compiled, *arguments), seconds, analysis.temp_size_in_bytes)


def time_in_turns(
    calls: Mapping[str, Call], repetitions: int, advance: Call = lambda: None
) -> dict[str, list[float]]:
    """Returns the seconds of every call, by name; one of each in turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if repetition:
                seconds[name].append(time.perf_counter() - began)
            advance()
    return seconds


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Returns median, lowest and highest of the ratios of two lists of one repetition each.

    >>> ratios([2.0, 3.0, 5.0], [1.0, 1.0, 2.0])
    {'ratio': 2.5, 'lowest': 2.0, 'highest': 3.0}
    """
    each = np.asarray(seconds) / np.asarray(reference)
    return {
        "ratio": float(np.median(each)),
        "lowest": float(each.min()),
        "highest": float(each.max()),
    }


def _timed(
    network: str, batch: int, method: str, label: str, seconds: Mapping[str, Sequence[float]]
) -> dict:
    median = float(np.median(seconds[method]))
    return {
        "network": network,
        "batch": batch,
        "method": method,
        label: median,
        "images_per_second": batch / median,
        **ratios(seconds[method], seconds[FULL]),
    }


def compare_methods(
    network: str, batch: int, methods: Sequence[str], repetitions: int, advance: Call = lambda: None
) -> list[dict]:
    """Returns a row for each method: step time, memory, compile time, as ratios too.

    Args:
      network: of the zoo.
      batch: images a step.
      methods: of `METHODS`, full precision first.
      repetitions: of every step, in turns.
      advance: called after every step and every compilation, for a progress bar.
    """
    cases = {}
    for method in methods:
        cases[method] = compile_step(make_problem(network, batch, method))
        advance()
    calls = {method: case.run for method, case in cases.items()}
    seconds = time_in_turns(calls, repetitions, advance)
    full = cases[FULL]
    return [
        {
            **_timed(network, batch, method, "step_seconds", seconds),
            "temp_bytes": case.temp_bytes,
            "temp_ratio": case.temp_bytes / full.temp_bytes,
            "compile_seconds": case.seconds,
            "compile_ratio": case.seconds / full.seconds,
        }
        for method, case in cases.items()
    ]


def compare_frozen(
    network: str, batch: int, repetitions: int, advance: Call = lambda: None
) -> list[dict]:
    """Returns a row for each of `FROZEN`: bytes on the device, and the time of an evaluation.

    Arguments are as `compare_methods` takes them.
    """
    cases, stored = {}, {}
    for name, config in FROZEN.items():
        problem = make_problem(network, batch, FULL, config)
        held, run = problem.state.variables, problem.model.apply
        if config is not None:
            held, run = freeze(problem.model, held, problem.images), FrozenModel.apply
        cases[name] = _compile(run, held, problem.images)
        stored[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
        advance()
    calls = {name: case.run for name, case in cases.items()}
    seconds = time_in_turns(calls, repetitions, advance)
    return [
        {
            **_timed(network, batch, name, "seconds", seconds),
            "stored_bytes": stored[name],
            "temp_bytes": case.temp_bytes,
            "peak_bytes": stored[name] + case.temp_bytes,
        }
        for name, case in cases.items()
    ]


def compare_with_copy(size: int, repetitions: int) -> list[dict]:
    """Returns a row for each quantizer: its time against that of a copy, over `size` floats.

    Outputs go into a buffer that is handed over, so that no new memory is touched.
    """
    x = jax.random.normal(jax.random.key(0), (size,))
    forms = {"copy": jnp.copy} | {
        f"{bits} bits{'' if signed else ' unsigned'}": functools.partial(
            fake_quantize, mu=2.0, scale=2.5, bits=bits, signed=signed
        )
        for bits, signed in ((4, True), (4, False), (8, True), (8, False))
    }
    buffers = {"free": jnp.zeros_like(x)}

    def call(compiled: Any) -> jax.Array:
        buffers["free"] = compiled(x, buffers["free"])
        return buffers["free"]

    calls = {}
    for name, form in forms.items():
        jitted = jax.jit(lambda x, _, form=form: form(x), donate_argnums=1, keep_unused=True)
        calls[name] = functools.partial(call, jitted.lower(x, x).compile())
    seconds = time_in_turns(calls, repetitions)
    return [
        {
            "quantizer": name,
            "nanoseconds": 1e9 * float(np.median(times)) / size,
            "gigabytes_per_second": 8e-9 * size / float(np.median(times)),
            **ratios(times, seconds["copy"]),
        }
        for name, times in seconds.items()
    ]


def compare_fit(network: str, batch: int, steps: int, steps_per_call: int) -> dict:
    """Returns the images a second of `fit` against those of its bare step, in mu-law W4A4.

    The first compiled call of an epoch, which compiles, is left out; shuffling, augmentation,
    metrics and the progress bar are in.
    """
    problem = make_problem(network, batch, MU_LAW)
    bare = {"bare": compile_step(problem).run}
    images = np.random.default_rng(0).integers(0, 256, (batch * steps, *_IMAGE), dtype=np.uint8)
    labels = (np.arange(len(images)) % _CLASSES).astype(np.int32)
    pixels = (0.5,) * 3, (0.25,) * 3
    data = ImageData("noise", images, labels, images[:1], labels[:1], _CLASSES, *pixels)
    config = FitConfig(1, batch, pad=4, flip=True, steps_per_call=steps_per_call)
    before = time_in_turns(bare, steps)["bare"]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log.jsonl"
        fit(problem.state, data, config, model=problem.model, tx=problem.tx, log=log)
        rows = read_log(log)[1:]
    after = time_in_turns(bare, steps)["bare"]
    step = float(np.median(before + after))
    whole = float(np.median([row["seconds"] for row in rows])) / config.steps_a_call(len(images))
    return {
        "network": network,
        "batch": batch,
        "steps_per_call": config.steps_a_call(len(images)),
        "bare_images_per_second": batch / step,
        "fit_images_per_second": batch / whole,
        "share": step / whole,
    }


def cost_curve(
    points: Mapping[float, tuple[str, int, QuantConfig | None]],
    repetitions: int,
    advance: Call = lambda: None,
) -> list[dict]:
    """Returns a row for each point, in full precision and in mu-law, all of them in turns.

    Args:
      points: by what the curve is over, (network, batch, configuration); None is W4A4.
      repetitions: of every step; 0 compiles only.
      advance: called after every step and every compilation, for a progress bar.
    """
    cases: dict[tuple[float, str], Case] = {}
    for at, (network, batch, config) in points.items():
        for method in (FULL, MU_LAW):
            own = config if method == MU_LAW else None
            cases[at, method] = compile_step(make_problem(network, batch, method, own))
            advance()
    seconds: dict = {key: [np.nan] for key in cases}
    if repetitions:
        calls = {f"{at} {method}": case.run for (at, method), case in cases.items()}
        named = time_in_turns(calls, repetitions, advance)
        seconds = {(at, method): named[f"{at} {method}"] for at, method in cases}
    rows = []
    for at in points:
        row: dict = {"at": at}
        for name, method in (("full", FULL), ("mu_law", MU_LAW)):
            row[f"{name}_compile_seconds"] = cases[at, method].seconds
            if repetitions:
                row[f"{name}_step_seconds"] = float(np.median(seconds[at, method]))
        if repetitions:
            row |= ratios(seconds[at, MU_LAW], seconds[at, FULL])
        rows.append(row)
    return rows
