"""Prints the test accuracy of a run's finished stages, or of a file that export.py wrote."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from command_line import parse, run_script

from compand_jax.data.images import load_data
from compand_jax.experiments.runs.artifacts import compare, count_correct, load_predictor
from compand_jax.experiments.runs.run import (
    evaluate_stage,
    finished_stages,
    load_run_data,
    read_config,
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Prints the test accuracy of a run's finished stages, or of a file that export.py wrote."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """A run's directory, that of one of its stages, or a file: .safetensors, .stablehlo, .onnx."""
    against: Path | None = None
    """Another file of the same network: how far the two are apart is printed too."""
    images: int | None = None
    """How many test images of a file's data set, the first of them; left out, all."""
    data_dir: Path | None = None
    """Directory of the prepared data sets; left out, the run's, or data for a file."""


def main(args: list[str]) -> None:
    """Prints a line `stage: correct/total = percent` for each stage."""
    options = parse(Args, args)
    if options.run_dir.is_file():
        _evaluate_file(options)
        return
    for name in ("against", "images"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"`{name}` goes with a file that export.py wrote, got {options.run_dir}: "
                "leave it out"
            )
    run_dir, only = options.run_dir, None
    if not (run_dir / "config.json").is_file() and (run_dir.parent / "config.json").is_file():
        run_dir, only = run_dir.absolute().parent, run_dir.absolute().name
    config = read_config(run_dir)
    names = finished_stages(run_dir)
    if only is not None:
        names = [name for name in names if name == only]
    if not names:
        raise ValueError(
            f"`run_dir` must have a finished stage, got {options.run_dir} with none: "
            "finish the run with scripts/train.py"
        )
    data = load_run_data(config, options.data_dir)
    for name in names:
        _print(name, *evaluate_stage(config, data, name))


def _evaluate_file(options: Args) -> None:
    predict, name = load_predictor(options.run_dir)
    other = None if options.against is None else load_predictor(options.against)
    if other is not None and other[1] != name:
        raise ValueError(
            f"`against` must be for the same data set, {name}, got {options.against} for "
            f"{other[1]}: give a file of the same network"
        )
    data = load_data(name, options.data_dir or "data")
    if options.images is not None:
        if not 1 <= options.images <= len(data.test_labels):
            raise ValueError(
                f"`images` must be from 1 to {len(data.test_labels)}, got {options.images}"
            )
        data = dataclasses.replace(
            data,
            test_images=data.test_images[: options.images],
            test_labels=data.test_labels[: options.images],
        )
    _print(options.run_dir.name, count_correct(predict, data), len(data.test_labels))
    if other is not None:
        print(f"{options.against}: {compare(predict, other[0], data.test_images)}", flush=True)


def _print(name: str, correct: int, total: int) -> None:
    print(f"{name}: {correct}/{total} = {100 * correct / total:.2f}%", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
