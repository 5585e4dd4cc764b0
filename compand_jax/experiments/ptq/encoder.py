"""A sentence encoder's weights quantized without training, and how far its vectors move.

Weights alone are quantized. A quantized network is the network itself with levels in the place of
kernels: so one compiled function serves all settings.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float

from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.layers.config import INHERIT, QuantConfig, Rule
from compand_jax.layers.model_size import model_bytes
from compand_jax.layers.observation import Observations
from compand_jax.layers.parametrization import entry
from compand_jax.layers.summary import site_weight
from compand_jax.linen.calibration import observe
from compand_jax.linen.dequantization import dequantized_params
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model

_MIDTREAD_FROM = 3
"""Bits. At 2 bits midtread has three levels, which no mu moves; midrise has four."""


@dataclasses.dataclass(frozen=True)
class EncoderSetting:
    """How an encoder's weights are quantized.

    Args:
      bits: Of the weights of layers that multiply.
      granularity: "tensor", "channel" or a group size.
      quantizer: As `QuantConfig`'s.
      error_feedback: Whether weights that are rounded later make up for those before.
    """

    bits: int
    granularity: str | int
    quantizer: str
    error_feedback: bool

    def config(self, tables: str, table_bits: int | None, scale_dtype: str) -> QuantConfig:
        """Returns the config of these layers; look-up tables have bits and groups of their own.

        Args:
          tables: Pattern of the look-up tables' sites.
          table_bits: Their bits, one scale for each feature unless there are groups; None leaves
            them in full precision.
          scale_dtype: What scales are stored in.
        """
        midrise = self.bits < _MIDTREAD_FROM
        return QuantConfig(
            weight_bits=self.bits,
            act_bits=None,
            quantizer=self.quantizer,
            weight_granularity=self.granularity,
            grid="midrise" if midrise else "midtread",
            scale_dtype=scale_dtype,
            rules=(
                Rule(
                    tables,
                    weight_bits=table_bits,
                    quantizer="uniform",
                    grid="midtread" if midrise else INHERIT,
                ),
            ),
        )


def settings(
    bits: Iterable[int], granularities: Iterable[str | int], quantizers: Iterable[str]
) -> list[EncoderSetting]:
    """Returns all combinations, with and without error feedback."""
    product = itertools.product(bits, granularities, quantizers, (False, True))
    return [EncoderSetting(*values) for values in product]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder, and what it is tried on.

    Attributes:
      model: Linen's; a batch is a tuple of its arguments.
      variables: Its collections.
      calibration: Batches for calibration.
      batches: Batches of the sentences to compare, each with its sentences' numbers.
      count: How many sentences there are.
      tables: Pattern of the sites that are look-up tables.
      table_bits: Their bits; None is full precision.
      scale_dtype: What scales are stored in.
    """

    model: nn.Module
    variables: Mapping[str, Any]
    calibration: list[tuple]
    batches: list[tuple[tuple, np.ndarray]]
    count: int
    tables: str
    table_bits: int | None
    scale_dtype: str

    def vectors(self, apply: Callable, params: Mapping) -> Float[np.ndarray, "sentences width"]:
        """Returns the sentences' vectors."""
        found: np.ndarray | None = None
        for args, numbers in self.batches:
            own = np.asarray(apply({**self.variables, "params": params}, *args))[: len(numbers)]
            if found is None:
                found = np.zeros((self.count, own.shape[1]), np.float32)
            found[numbers] = own
        if found is None:
            raise UserError("`sentences` must be at least 1, got 0: give some")
        return found


def rows(encoder: Encoder, wanted: Iterable[EncoderSetting]) -> Iterator[dict[str, Any]]:
    """Yields what is measured of each setting, one by one."""
    wanted = list(wanted)
    apply = jax.jit(encoder.model.apply)
    exact = encoder.vectors(apply, encoder.variables["params"])
    # Without error feedback no products of the inputs are needed.
    seen = observe(
        encoder.model,
        encoder.variables,
        encoder.calibration,
        {},
        at_output=False,
        activations=False,
        moments=any(setting.error_feedback for setting in wanted),
    )
    for setting in wanted:
        qmodel, variables, seconds = quantized(encoder, setting, seen)
        params = dequantized_params(qmodel, variables)
        yield {
            **dataclasses.asdict(setting),
            **agreement(encoder.vectors(apply, params), exact),
            "bits_per_weight": bits_per_weight(qmodel, variables),
            "model_bytes": model_bytes(variables, qmodel.sites),
            "seconds": round(seconds, 1),
        }


def quantized(
    encoder: Encoder, setting: EncoderSetting, seen: Observations
) -> tuple[QuantizedModel, dict[str, Any], float]:
    """Returns the encoder quantized, its variables, and the seconds that it took."""
    with user_errors(ValueError):
        config = setting.config(encoder.tables, encoder.table_bits, encoder.scale_dtype)
        start = time.perf_counter()
        qmodel, variables = quantize_model(encoder.model, config).calibrate_from(
            seen, encoder.variables, error_feedback=setting.error_feedback
        )
        jax.block_until_ready(variables)
    return qmodel, variables, time.perf_counter() - start


def bits_per_weight(qmodel: QuantizedModel, variables: Mapping[str, Any]) -> float:
    """Returns the bits of a quantized weight on average, scales and mu included."""
    total, count = 0, 0
    for name, found in qmodel.quantizers(variables).items():
        weight = site_weight(variables["params"], name)
        own = entry(found, "weight", qmodel.site(name).spec("weight"))
        mus = 0 if own is None else own.size
        total += qmodel.site(name).weight_bytes(weight.size, found["weight_scale"].size, mus)
        count += weight.size
    return 8 * total / max(count, 1)


def agreement(
    vectors: Float[np.ndarray, "sentences width"], exact: Float[np.ndarray, "sentences width"]
) -> dict[str, float]:
    """Returns how far vectors agree with those in full precision, all of length 1.

    Returns:
      `cosine`, the mean of the cosines between a sentence's vectors, and `cosine_p1`, their first
      percentile; `nearest`, the share of the sentences whose nearest other one stays the nearest;
      `nearest_10`, what is left of the 10 nearest, on average.
    """
    cosines = np.sum(np.float64(vectors) * np.float64(exact), 1)
    found, expected = _nearest(vectors), _nearest(exact)
    kept = [len(np.intersect1d(*pair)) / len(pair[0]) for pair in zip(found, expected, strict=True)]
    return {
        "cosine": float(np.mean(cosines)),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "nearest": float(np.mean(found[:, 0] == expected[:, 0])),
        "nearest_10": float(np.mean(kept)),
    }


def _nearest(vectors: np.ndarray, count: int = 10) -> np.ndarray:
    """Returns the nearest others of each vector, the nearest first; fewer if there are not many."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]
