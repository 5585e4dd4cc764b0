"""Writes the quantized network of a finished run to a file that runs elsewhere.

A run's last quantized stage is taken, or the stage whose directory is given.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from command_line import parse, run_script

from compand_jax.data.images import load_data
from compand_jax.experiments.runs.artifacts import (
    compare,
    export,
    freeze_stage,
    predictor,
    quantized_stages,
)
from compand_jax.experiments.runs.directory import read_config


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
        raise ValueError(f"`compress` goes with safetensors, got {options.format}: leave it out")
    run_dir, only = options.run_dir, None
    if not (run_dir / "config.json").is_file() and (run_dir.parent / "config.json").is_file():
        run_dir, only = run_dir.absolute().parent, run_dir.absolute().name
    config = read_config(run_dir)
    data = load_data(config.dataset, options.data_dir or config.data_dir)
    names = [name for name in quantized_stages(config, data) if only in (None, name)]
    if not names:
        raise ValueError(
            f"`run_dir` must have a finished quantized stage, got {options.run_dir} with none: "
            "finish the run with scripts/train.py"
        )
    name = names[-1]
    path = options.output or run_dir / name / f"{name}.{options.format}"
    if path.suffix != f".{options.format}":
        raise ValueError(f"`output` must end in .{options.format}, got {path}: rename it")
    frozen = freeze_stage(config, data, name, fold_norms=options.fold_norms)
    export(frozen, config, data, path, options.format, options.compress)
    print(frozen.summary())
    if options.fold_norms:
        folded, plain = (
            predictor(each, data.mean, data.std)
            for each in (frozen, freeze_stage(config, data, name))
        )
        found = compare(folded, plain, data.test_images[:1000])
        print(f"\n{len(frozen.shifts())} of its batch norms folded, against none: {found}")
    print(f"\n{name}, {path.stat().st_size} bytes: {path}")


if __name__ == "__main__":
    sys.exit(run_script(main))
