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


def mutations(data, rng, count):
    """Bits flipped, bytes set, parts cut out, doubled, moved, and the end cut off or lengthened."""
    for i in range(count):
        found = bytearray(data)
        at, length = int(rng.integers(len(found))), int(rng.integers(1, 64))
        match i % 6:
            case 0:
                found[at] ^= 1 << int(rng.integers(8))
            case 1:
                found[at] = (found[at] + int(rng.integers(1, 256))) % 256
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                del found[at:]
            case 5:
                found += bytes(length)
        if found != data:
            yield bytes(found)


LEAVES = [None, True, -1, 0, 3, 2**40, 1e308, "", "zlib", "float64", [], [-1], [[]], {}, {"a": 1}]


def mutate_json(tree, rng):
    """Replaces, drops or adds one entry somewhere below."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        match int(rng.integers(3)):
            case 0:
                node[key] = LEAVES[int(rng.integers(len(LEAVES)))]
            case 1:
                del node[key]
            case 2 if isinstance(node, dict):
                node[f"{key}~2/x"] = child
        return


def resealed(data, rng, count):
    """Yields files whose checksum is right, with one entry of another content."""
    header, body = split(data)
    text = json.dumps({"header": header, "d": json.loads(header["__metadata__"]["description"])})
    for _ in range(count):
        tree = json.loads(text)
        mutate_json(tree, rng)
        found, description = tree.get("header"), tree.get("d")
        if isinstance(found, dict) and isinstance(found.get("__metadata__"), dict):
            found["__metadata__"]["description"] = json.dumps(description)
            yield sealed(found, body)
