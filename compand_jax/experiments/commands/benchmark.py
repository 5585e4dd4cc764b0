"""Measures what quantization costs, and records it: step time, memory, compile time, curves.

Usage: benchmark.py [--quick]. It runs on whatever device jax has; a CPU should be idle.
"""

import dataclasses
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from compand_jax.experiments.benchmark.measure import (
    FROZEN,
    FULL,
    METHODS,
    QWIX,
    compare_fit,
    compare_frozen,
    compare_methods,
    compare_with_copy,
    cost_curve,
    make_network,
    quantized,
)
from compand_jax.experiments.benchmark.report import CURVES, benchmark_text, plot_curves
from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import require, user_errors
from compand_jax.experiments.records import make_writable, provenance, write_json, write_text
from compand_jax.layers.config import QuantConfig

_PARTS = ("steps", "copies", "frozen", "fit", *CURVES)
_FROZEN = (("vgg19", 16), ("alexnet", 16))


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures what quantization costs, and records it."""

    networks: tuple[str, ...] = ("alexnet:128", "vgg19:64", "resnet20:128")
    """What is compared, NETWORK:BATCH each."""
    methods: tuple[str, ...] = tuple(METHODS)
    """By which methods: any of full precision, mu-law W4A4, mu-law W8A8, uniform W4A4, qwix int8
    (which needs the extra `bench`). Full precision is always measured."""
    parts: tuple[str, ...] = _PARTS
    """What is measured: steps (the table of networks and methods), copies (fake_quantize against a
    copy), frozen (VGG19 and AlexNet evaluated from packed codes), fit (an epoch), and the curves
    bits, batch, width and depth."""
    repetitions: int = 7
    """Timed runs of each step, in turns."""
    size: int = 8_000_000
    """Values that fake_quantize is measured on."""
    quick: bool = False
    """A look in a few minutes: AlexNet at batch 32, three repetitions, two points a curve."""
    record_dir: Path | None = None
    """Directory of the record; left out, results/benchmark-cpu, -gpu or -tpu."""

    def __post_init__(self):
        for name, known in (("methods", METHODS), ("parts", _PARTS)):
            require(self, name, set(getattr(self, name)) <= set(known), f"of {', '.join(known)}")
        for name in ("repetitions", "size"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for text in self.networks:
            network, _, batch = text.partition(":")
            ok = batch.isdecimal() and int(batch) >= 1
            require(self, "networks", ok, "NETWORK:BATCH, each batch a size of at least 1")
            with user_errors(ValueError):
                make_network(network)


def main(args: list[str]) -> None:
    """Measures, prints and records."""
    options = parse(Args, args, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, networks=("alexnet:32",), repetitions=3)
    methods = [name for name in METHODS if name in (FULL, *options.methods)]
    if QWIX in methods:  # before any work, if it is not there
        quantized(make_network("cnn"), QWIX, None)
    record_dir = options.record_dir or Path(f"results/benchmark-{jax.default_backend()}")
    make_writable({"record_dir": (record_dir, 0)})
    record = measure(options, methods)
    write_json(record_dir / "benchmark.json", record)
    text = benchmark_text(record)
    write_text(record_dir / "benchmark.md", f"# Benchmark\n\n{text}\n")
    if record["curves"]:
        plot_curves(record["curves"], record_dir / "curves.png")
    print(f"\n{text}\n\nIn {record_dir}: benchmark.json, benchmark.md, curves.png")


def measure(options: Args, methods: list[str]) -> dict:
    """Returns the record of what the options ask for."""
    pairs = [(text.partition(":")[0], int(text.partition(":")[2])) for text in options.networks]
    curves = {name: at for name, at in _curves(options.quick).items() if name in options.parts}
    repeats = {name: 0 if name == "depth" else options.repetitions for name in curves}
    total = sum(2 * len(points) * (2 + repeats[name]) for name, points in curves.items())
    total += len(pairs) * len(methods) * (2 + options.repetitions) * ("steps" in options.parts)
    frozen = [pair for pair in _FROZEN if "frozen" in options.parts]
    frozen = frozen[-1:] if options.quick else frozen
    total += len(frozen) * len(FROZEN) * (2 + options.repetitions)
    config = {**dataclasses.asdict(options), "record_dir": None, "methods": methods}
    record = {"config": config, "steps": [], "frozen": [], "curves": {}}
    with tqdm(total=total, desc="benchmark", mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        if "copies" in options.parts:
            record["copies"] = compare_with_copy(options.size, 3 * options.repetitions)
        if "steps" in options.parts:
            for network, batch in pairs:
                record["steps"] += compare_methods(
                    network, batch, methods, options.repetitions, bar.update
                )
        for network, batch in frozen:
            record["frozen"] += compare_frozen(network, batch, options.repetitions, bar.update)
        if "fit" in options.parts:
            network, batch = pairs[0]
            record["fit"] = compare_fit(network, batch, 4 * options.repetitions, 4)
        for name, points in curves.items():
            record["curves"][name] = cost_curve(points, repeats[name], bar.update)
    return record | provenance(("qwix", "aqtp"))


def _curves(quick: bool) -> dict:
    """Returns the points of every curve: network, batch, and the quantization if not W4A4."""
    batch = 32 if quick else 128
    curves = {
        "bits": {
            bits: ("alexnet", batch, QuantConfig(weight_bits=bits, act_bits=bits))
            for bits in range(2, 9)
        },
        "batch": {n: ("alexnet", n, None) for n in (32, 64, 128, 256)},
        "width": {width: (f"plain-{width}", 64, None) for width in (1, 2, 3, 4)},
        "depth": {depth: (f"vgg{depth}", 4, None) for depth in (11, 13, 16, 19)},
    }
    if not quick:
        return curves
    return {
        name: {at: points[at] for at in (min(points), max(points))}
        for name, points in curves.items()
    }
