"""Writes the quantized network of a finished run to a file that runs elsewhere.

A run's last quantized stage is taken, or the stage whose directory is given.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from compand_jax.experiments.commands.arguments import parse
from compand_jax.experiments.errors import UserError
from compand_jax.experiments.runs.config import CONTROL, FULL_PRECISION
from compand_jax.experiments.runs.directory import find_stages, read_config
from compand_jax.experiments.runs.export import compare, export, freeze_stage, logits, predictor
from compand_jax.experiments.runs.run import load_run_data


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes the quantized network of a finished run to a file that runs elsewhere."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """A run's directory, or that of one of its quantized stages."""
    format: Literal["safetensors", "stablehlo", "onnx"] = "safetensors"
    """safetensors: packed codes, for `load_frozen`. stablehlo and onnx: uint8 images to logits, for
    jax alone and for onnxruntime."""
    output: Path | None = None
    """The file; left out, the stage's directory and name, ending in the format."""
    compress: bool = False
    """Whether to store codes by zlib where that takes fewer bytes; of safetensors."""
    fold_norms: bool = False
    """Whether to fold batch norms into the layers before them; the difference that this makes on
    1,000 test images is printed."""
    data_dir: Path | None = None
    """Directory of the prepared data sets; left out, the run's."""


def main(args: list[str]) -> None:
    """Prints a table of sizes and the file's name."""
    options = parse(Args, args, description=__doc__)
    if options.compress and options.format != "safetensors":
        raise UserError(f"`compress` goes with safetensors, got {options.format}: leave it out")
    run_dir, names = find_stages(options.run_dir)
    config = read_config(run_dir)
    names = [name for name in names if name not in (FULL_PRECISION, CONTROL.name)]
    if not names:
        raise UserError(
            f"`run_dir` must have a finished quantized stage, got {options.run_dir} with none: "
            "finish the run with compand train"
        )
    name, data = names[-1], load_run_data(config, options.data_dir)
    path = options.output or run_dir / name / f"{name}.{options.format}"
    if path.suffix != f".{options.format}":
        raise UserError(f"`output` must end in .{options.format}, got {path}: rename it")
    frozen = freeze_stage(config, data, name, fold_norms=options.fold_norms)
    export(frozen, config, data, path, options.format, options.compress)
    print(frozen.summary())
    if options.fold_norms:
        images = data.test_images[:1000]
        folded, plain = (
            logits(predictor(each, data.mean, data.std), images)
            for each in (frozen, freeze_stage(config, data, name))
        )
        shifts = len(frozen.shifts())
        print(f"\n{shifts} of its batch norms folded, against none: {compare(folded, plain)}")
    print(f"\n{name}, {path.stat().st_size} bytes: {path}")
