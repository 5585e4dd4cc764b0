"""Prints the test accuracy of a run's finished stages, or of a file that export.py wrote."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from compand_jax.data.images import load_data
from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.runs.directory import find_stages, read_config
from compand_jax.experiments.runs.export import compare, load_predictor, logits
from compand_jax.experiments.runs.run import evaluate_stage, load_run_data


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
            raise UserError(
                f"`{name}` goes with a file that export.py wrote, got {options.run_dir}: "
                "leave it out"
            )
    run_dir, names = find_stages(options.run_dir)
    config = read_config(run_dir)
    if not names:
        raise UserError(
            f"`run_dir` must have a finished stage, got {options.run_dir} with none: "
            "finish the run with compand train"
        )
    data = load_run_data(config, options.data_dir)
    for name in names:
        _print(name, *evaluate_stage(config, data, name))


def _evaluate_file(options: Args) -> None:
    predict, name = load_predictor(options.run_dir)
    other = None if options.against is None else load_predictor(options.against)
    if other is not None and other[1] != name:
        raise UserError(
            f"`against` must be for the same data set, {name}, got {options.against} for "
            f"{other[1]}: give a file of the same network"
        )
    with user_errors(OSError, ValueError):
        data = load_data(name, options.data_dir or "data")
    count = len(data.test_labels)
    if options.images is not None and not 1 <= options.images <= count:
        raise UserError(f"`images` must be from 1 to {count}, got {options.images}")
    images, labels = data.test_images[: options.images], data.test_labels[: options.images]
    found = logits(predict, images)
    _print(options.run_dir.name, int((found.argmax(-1) == labels).sum()), len(labels))
    if other is not None:
        print(f"{options.against}: {compare(found, logits(other[0], images))}", flush=True)


def _print(name: str, correct: int, total: int) -> None:
    print(f"{name}: {correct}/{total} = {100 * correct / total:.2f}%", flush=True)
