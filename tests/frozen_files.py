"""A frozen model's file, taken apart and sealed again."""

import hashlib
import json

import jax
from small_models import NormedNet, drawn, normal

import compand_jax as cj

X = (5, 4)


def saved_model(path):
    """Writes a small frozen model, of 3 bits and a scale for each channel.

    Returns the path, the frozen model, and the outputs of the quantized one.
    """
    config = cj.QuantConfig(weight_bits=3, weight_granularity="channel")
    qmodel = cj.quantize_model(NormedNet(), config)
    variables = drawn(qmodel, normal(*X))
    frozen = cj.freeze(qmodel, variables, normal(*X))
    frozen.save(path, info={"name": "normed"})
    return path, frozen, jax.jit(qmodel.apply)(variables, normal(*X))


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header, body):
    """A file with a checksum that is right, whatever is in it."""
    header = json.loads(json.dumps(header))
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    data = len(text).to_bytes(8, "little") + text + body
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest, 1)
