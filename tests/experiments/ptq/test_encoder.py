"""What is measured of a quantized encoder, and its record."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.experiments.errors import UserError
from compand_jax.experiments.ptq.encoder import Encoder, EncoderSetting, EncoderTable, agreement
from compand_jax.experiments.ptq.encoder_record import (
    encoder_document,
    is_done,
    open_record,
    write_record,
)


def test_agreement_counts_neighbours():
    angles = np.radians([0, 10, 25, 45, 70, 100])
    exact = np.stack([np.cos(angles), np.sin(angles)], 1)
    same = agreement(exact, exact)
    assert same == pytest.approx({"cosine": 1, "cosine_p1": 1, "nearest": 1, "nearest_10": 1})
    moved = exact.copy()
    moved[1] = np.cos(np.radians(22)), np.sin(np.radians(22))
    found = agreement(moved, exact)
    # Of 0, 1 and 2 the nearest were 1, 0 and 1; 1 now has 2 beside it.
    assert found["nearest"] == pytest.approx(5 / 6)
    assert found["nearest_10"] == 1  # all others
    assert found["cosine"] == pytest.approx((5 + np.cos(np.radians(12))) / 6)


class Bag(nn.Module):
    """The mean of words, through a layer."""

    @nn.compact
    def __call__(self, words):
        x = nn.Dense(16, name="up")(nn.Embed(32, 8, name="words")(words).mean(1))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def bag(**fields):
    words = np.random.default_rng(0).integers(0, 32, (40, 4)).astype(np.int32)
    variables = jax.jit(Bag().init)(jax.random.key(0), words)
    batches = [((words[:20],), np.arange(20)), ((words[20:],), np.arange(20, 40))]
    return Encoder(
        Bag(), variables, [(words,)], batches, 40, "words", table_group=8, method="mse", **fields
    )


def test_a_table_of_an_encoder(tmp_path):
    table = EncoderTable(bag())
    wanted = [EncoderSetting(4, 4, "uniform", True), EncoderSetting(2, "tensor", "uniform", False)]
    rows = list(table.rows(wanted))
    # 128 weights of 4 bits, 32 scales of two bytes; of 2 bits, one scale.
    assert rows[0]["bits_per_weight"] == 8 * (64 + 2 * 32) / 128
    assert rows[1]["bits_per_weight"] == 8 * (32 + 4) / 128
    # With 256 table entries of 8 bits, 32 scales of two bytes, and 16 biases.
    assert rows[1]["model_bytes"] == 36 + 256 + 64 + 64
    assert 1 > rows[0]["cosine"] > rows[1]["cosine"] > 0.5
    config = {
        "encoder": "bag", "sentences": 40, "source": "numbers", "calibration_sentences": 40,
        "calibration_source": "numbers", "calibration": "mse", "table_bits": 8,
        "table_group": 8, "scale_dtype": "float16", "seed": 0,
    }  # fmt: skip
    record = open_record(tmp_path, config)
    record |= {"versions": {"jax": "1"}, "devices": "one", "date": "today", "rows": rows[::-1]}
    record["full_precision_bytes"] = table.full_precision_bytes()
    record["tables_alone"] = table.with_tables_alone()
    text = write_record(tmp_path, record)
    again = open_record(tmp_path, config)
    assert encoder_document(again) == text
    assert [row["bits"] for row in again["rows"]] == [4, 2]
    assert is_done(again, {**rows[0]})
    assert not is_done(again, {**rows[0], "bits": 3})
    with pytest.raises(UserError, match="`out` must be new or of this configuration"):
        open_record(tmp_path, {**config, "seed": 1})


def test_levels_in_the_place_of_weights_are_what_the_quantized_model_computes_with():
    from compand_jax.linen.dequantization import dequantized_params

    encoder = bag(table_bits=None)
    setting = EncoderSetting(3, 4, "uniform", False)
    qmodel, variables, _ = EncoderTable(encoder).quantized(setting)
    words = encoder.batches[0][0][0]
    expected = jax.jit(qmodel.apply)(variables, words)
    found = jax.jit(Bag().apply)({"params": dequantized_params(qmodel, variables)}, words)
    np.testing.assert_allclose(found, expected, atol=1e-6)
