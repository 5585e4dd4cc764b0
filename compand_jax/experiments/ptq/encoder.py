"""A sentence encoder's weights quantized without training, and how far its vectors move.

Weights alone are quantized. A quantized network is the network itself with levels in the place of
kernels: so one compiled function serves all settings. Look-up tables, which are most of a small
encoder, are quantized once and alike in all settings.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float

from compand_jax.core.families.registry import family_of
from compand_jax.experiments.errors import UserError, user_errors
from compand_jax.layers.config import QuantConfig, Rule
from compand_jax.layers.model_size import model_bytes
from compand_jax.layers.parametrization import entry
from compand_jax.layers.summary import site_weight
from compand_jax.linen.calibration import observe
from compand_jax.linen.dequantization import dequantized_params
from compand_jax.linen.quantized_model import QuantizedModel, quantize_model


@dataclasses.dataclass(frozen=True)
class EncoderSetting:
    """How the weights of an encoder's layers are quantized.

    Args:
      bits: Of a weight.
      granularity: "tensor", "channel" or a group size.
      quantizer: As `QuantConfig`'s.
      error_feedback: Whether weights that are rounded later make up for those before.
    """

    bits: int
    granularity: str | int
    quantizer: str
    error_feedback: bool

    def config(self, tables: str, scale_dtype: str) -> QuantConfig:
        """Returns the config; the sites of look-up tables, by their pattern, are left.

        All 2^bits codes are used where the family has the grid "midrise".
        """
        return QuantConfig(
            weight_bits=self.bits,
            act_bits=None,
            quantizer=self.quantizer,
            weight_granularity=self.granularity,
            grid="midrise" if "midrise" in family_of(self.quantizer).grids else "midtread",
            scale_dtype=scale_dtype,
            rules=(Rule(tables, weight_bits=None),),
        )


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
      table_group: How many of a row's features share a scale.
      scale_dtype: What scales are stored in.
      method: How scales are found: "mse", "absmax" or "output".
    """

    model: nn.Module
    variables: Mapping[str, Any]
    calibration: list[tuple]
    batches: list[tuple[tuple, np.ndarray]]
    count: int
    tables: str
    table_bits: int | None = 8
    table_group: int = 64
    scale_dtype: str = "float16"
    method: str = "output"

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


class EncoderTable:
    """Settings of one encoder, measured one by one; it is observed once.

    Args:
      encoder: What is tried.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._apply = jax.jit(encoder.model.apply)
        self._exact = encoder.vectors(self._apply, encoder.variables["params"])
        self._seen = observe(
            encoder.model,
            encoder.variables,
            encoder.calibration,
            {},
            at_output=False,
            activations=False,
            moments=True,
        )
        self._variables, self._table_bytes = self._with_tables()

    def rows(self, wanted: Iterable[EncoderSetting]) -> Iterator[dict[str, Any]]:
        """Yields what is measured of each setting."""
        for setting in wanted:
            qmodel, variables, seconds = self.quantized(setting)
            vectors = self._encoder.vectors(self._apply, dequantized_params(qmodel, variables))
            yield {
                **dataclasses.asdict(setting),
                **agreement(vectors, self._exact),
                "bits_per_weight": bits_per_weight(qmodel, variables),
                "model_bytes": model_bytes(variables, qmodel.sites) + self._table_bytes,
                "seconds": round(seconds, 1),
            }

    def quantized(self, setting: EncoderSetting) -> tuple[QuantizedModel, dict[str, Any], float]:
        """Returns the encoder quantized, its variables, and the seconds that it took."""
        own = self._encoder
        with user_errors(ValueError):
            config = setting.config(own.tables, own.scale_dtype)
            start = time.perf_counter()
            qmodel, variables = quantize_model(own.model, config).calibrate_from(
                self._seen,
                self._variables,
                calibration=own.method,
                error_feedback=setting.error_feedback,
            )
            jax.block_until_ready(variables["params"])
        return qmodel, variables, time.perf_counter() - start

    def full_precision_bytes(self) -> int:
        """Returns the bytes of the encoder as it is."""
        return model_bytes(self._encoder.variables)

    def with_tables_alone(self) -> dict[str, Any]:
        """Returns what quantizing the look-up tables alone does."""
        vectors = self._encoder.vectors(self._apply, self._variables["params"])
        return {
            **agreement(vectors, self._exact),
            "model_bytes": model_bytes(self._variables) + self._table_bytes,
        }

    def _with_tables(self) -> tuple[dict[str, Any], int]:
        """Returns the variables with levels for look-up tables, and the bytes that this adds."""
        own = self._encoder
        if own.table_bits is None:
            return dict(own.variables), 0
        config = QuantConfig(
            weight_bits=None,
            act_bits=None,
            scale_dtype=own.scale_dtype,
            weight_granularity=own.table_group,
            quantizer="uniform",
            rules=(Rule(own.tables, weight_bits=own.table_bits),),
        )
        with user_errors(ValueError):
            qmodel, variables = quantize_model(own.model, config).calibrate_from(
                self._seen, own.variables, calibration="absmax"
            )
        params = dequantized_params(qmodel, variables)
        change = model_bytes(variables, qmodel.sites) - model_bytes(own.variables)
        return {**own.variables, "params": params}, change


def bits_per_weight(qmodel: QuantizedModel, variables: Mapping[str, Any]) -> float:
    """Returns the bits of a quantized weight on average, scales and mu included."""
    total, count = 0, 0
    for name, found in qmodel.quantizers(variables).items():
        weight, site = site_weight(variables["params"], name), qmodel.site(name)
        own = entry(found, "weight", site.spec("weight"))
        total += site.weight_bytes(
            weight.size, found["weight_scale"].size, 0 if own is None else own.size
        )
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
