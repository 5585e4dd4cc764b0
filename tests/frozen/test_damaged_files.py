"""Files that are damaged, or hold what they may not: an error of one line, whatever they hold."""

import contextlib
import hashlib
import json
import os
import re
import zlib

import numpy as np
import pytest
from frozen_files import mutations, resealed, saved_model, sealed, split
from small_models import NormedNet

import compand_jax as cj
from compand_jax.frozen.description import from_file
from compand_jax.frozen.file import MAX_HEADER, read_sealed

pytestmark = pytest.mark.filterwarnings(
    "ignore:the quantized model is not calibrated"  # its mu and scales are drawn at random here
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("frozen") / "model.safetensors")


def edited(made, edit):
    """The file with its header, description or arrays changed, and sealed again."""
    header, body = split(made[0].read_bytes())
    description = json.loads(header["__metadata__"]["description"])
    body = bytearray(body)
    edit(header, description, lambda name: body_view(header, body, name))
    header["__metadata__"]["description"] = json.dumps(description)
    return sealed(header, bytes(body))


def body_view(header, body, name):
    start, stop = header[name]["data_offsets"]
    kind = {"U8": np.uint8, "F32": np.float32}[header[name]["dtype"]]
    return np.frombuffer(memoryview(body)[start:stop], kind).reshape(header[name]["shape"])


def variable_above_a_weight(header, description, _):
    for place in (header, description["variables"]):
        prefix = "variables/" if place is header else ""
        place[f"{prefix}params/first"] = place.pop(f"{prefix}params/first/bias")


def variable_in_the_place_of_a_weight(header, description, _):
    for place in (header, description["variables"]):
        prefix = "variables/" if place is header else ""
        place[f"{prefix}params/first/kernel"] = place.pop(f"{prefix}params/first/bias")


def deep_variable(header, description, _, depth=10**6):
    path = "params/" * depth + "x"
    header[f"variables/{path}"] = header.pop("variables/params/first/bias")
    description["variables"] = {
        name: kind for name, kind in description["variables"].items() if "first/bias" not in name
    } | {path: "float32"}


def rename_version(header, *_):
    header["__metadata__"]["version"] = "1"


def longer(_, description, __):
    description["sites"]["first"]["weight"]["shape"] = [10, 6]


def transposed(_, description, __):
    description["sites"]["first"]["weight"]["shape"] = [6, 4]  # of as many codes


def code_out_of_range(_, __, array):
    array("codes/first")[0] |= 7


def descending(_, __, array):
    table = array("levels/first")
    table[:] = table[::-1].copy()


def not_finite(_, __, array):
    array("levels/second")[0] = np.nan


def infinite_scale(_, __, array):
    array("scales/first")[0, 3] = np.inf


def other_norm(_, description, __):
    description["sites"]["first"]["weight"]["norm"] = "norm"


def thresholds_outside(_, __, array):
    array("act_thresholds/first")[:] += 100


def nested(header, *_):
    header["__metadata__"]["deep"] = None


def nested_list(depth):
    found = ["value", 1]
    for _ in range(depth):
        found = ["tuple", [found]]
    return found


def signature(description, **fields):
    description["signature"].update(fields)


def called(description, **fields):
    description["signature"]["call"].update(fields)


def other_leaf(header, description, _):
    for place in (header, description["variables"]):
        prefix = "variables/" if place is header else ""
        place[f"{prefix}params/first/bus"] = place.pop(f"{prefix}params/first/bias")


EDITS = {
    "of version 2 of the format, got .* of version '1': read it with": rename_version,
    "scales of another shape than weight 'first'": transposed,
    "scales not of finite float32 in site 'first'": infinite_scale,
    "other shifts than described": other_norm,
    "no norm of site 'first'": lambda h, d, a: d["sites"]["first"]["weight"].update(norm=["x"]),
    "9 bytes, not 23, of site 'first'": longer,
    "a code out of range in site 'first'": code_out_of_range,
    "a table that is not in ascending order in site 'first'": descending,
    "a table not of finite float32 in site 'second'": not_finite,
    "thresholds that are not between the levels in site 'first'": thresholds_outside,
    "other fields of site": lambda h, d, a: d["sites"]["first"].pop("act_bits"),
    "no bits or grid of site 'first'": lambda h, d, a: d["sites"]["first"]["weight"].update(
        bits="3"
    ),
    "`bits` must be an integer": lambda h, d, a: d["sites"]["first"]["weight"].update(bits=99),
    "an unknown encoding": lambda h, d, a: d["sites"]["first"].update(encoding="pickle"),
    "codes of site 'first': .*incorrect header": lambda h, d, a: d["sites"]["first"].update(
        encoding="zlib"
    ),
    "other codes than described": lambda h, d, a: d["sites"].pop("first"),
    "a header of 1\\d{7} bytes": deep_variable,
    "a variable in too many modules": lambda h, d, a: deep_variable(h, d, a, 10**5),
    "a variable within another: write": variable_above_a_weight,
    "a variable within another": variable_in_the_place_of_a_weight,
    "no act_site": lambda h, d, a: d.update(act_site="middle"),
    "a signature that is none": lambda h, d, a: d.update(signature=[1]),
    "a signature without shapes": lambda h, d, a: signature(d, initial={"x": [-1]}),
    "a signature that is none: not the fields method": lambda h, d, a: signature(d, call=1),
    "a signature that is none: arguments of no method": lambda h, d, a: called(
        d, method=["value", "__init__"]
    ),
    "a signature that is none: an argument that is none": lambda h, d, a: called(
        d, args=nested_list(100)
    ),
    "no leaf_dtype of weight 'first'": lambda h, d, a: d["sites"]["first"]["weight"].update(
        leaf_shape=[4, 6]
    ),
    "no leaf of site 'first'": lambda h, d, a: d["sites"]["first"]["weight"].update(leaf=[1]),
    r"`model` must be the one .* of shape \(6,\), not \(7,\)": lambda h, d, a: d["signature"][
        "initial"
    ].update({"params/first/bias": [7]}),
    "`model` must be the one .* does not run on its variables: .*bias": other_leaf,
    "an unknown type of variable": lambda h, d, a: d["variables"].update(
        {"params/first/bias": "object"}
    ),
    "an array described as": lambda h, d, a: h["codes/first"].update(dtype="F64"),
    "in other bytes than its own": lambda h, d, a: h["codes/first"].update(data_offsets=[0, 10**9]),
    "other variables than described": lambda h, d, a: d["variables"].pop("params/first/bias"),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", EDITS)
def test_what_a_sealed_file_may_not_hold(message, made, tmp_path):
    path = tmp_path / "edited.safetensors"
    path.write_bytes(edited(made, EDITS[message]))
    with pytest.raises(ValueError, match=message) as caught:
        cj.load_frozen(path, NormedNet())
    assert "\n" not in str(caught.value)


@pytest.mark.quick
def test_files_that_are_none(made, tmp_path):
    path, data = tmp_path / "file.safetensors", made[0].read_bytes()
    header, _ = split(data)
    deep = b"[" * 100_000
    metadata = json.dumps(header["__metadata__"] | {"sha256": "0" * 64}, separators=(",", ":"))
    nested = b'{"__metadata__":' + metadata.encode() + b',"x":' + deep
    whole = len(nested).to_bytes(8, "little") + nested
    digest = hashlib.sha256(whole).hexdigest().encode()
    cases = {
        "a header of 0 bytes in a file of 0": b"",
        "a header of 3 bytes in a file of 3": b"abc"[:0] + (3).to_bytes(3, "little"),
        "a header of 1073741824 bytes": (2**30).to_bytes(8, "little") + data[8:],
        "a header of 18446744073709551615 bytes": b"\xff" * 8 + data[8:],
        f"a header of {MAX_HEADER + 1} bytes": (MAX_HEADER + 1).to_bytes(8, "little")
        + bytes(MAX_HEADER + 1),
        "a checksum that is not the file's": data[:-1],
        "no checksum": data.replace(b"sha256", b"sha257"),
        "no JSON .*recursion": whole.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            cj.load_frozen(path, NormedNet())
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="No such file"):
        cj.load_frozen(tmp_path / "none", NormedNet())
    with pytest.raises(OSError, match="directory"):
        cj.load_frozen(tmp_path, NormedNet())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="with no end: it is a pipe"):
        cj.load_frozen(tmp_path / "pipe", NormedNet())


def test_decompression_is_bounded(made, tmp_path):
    def bomb(header, description, array):
        codes = array("codes/first")
        packed = zlib.compress(bytes(10**6))[: codes.size]
        codes[: len(packed)] = np.frombuffer(packed, np.uint8)
        description["sites"]["first"]["encoding"] = "zlib"
        description["sites"]["first"]["weight"] |= {"shape": [10**6, 6]}

    path = tmp_path / "bomb.safetensors"
    path.write_bytes(edited(made, bomb))
    with pytest.raises(ValueError, match="more codes than bytes for them in site 'first'"):
        cj.load_frozen(path, NormedNet())


def test_ten_thousand_damaged_files(made, tmp_path):
    data, path = made[0].read_bytes(), tmp_path / "damaged"
    rng, count = np.random.default_rng(0), 0
    for content in mutations(data, rng, 10_500):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError)) as caught:
            read_sealed(path)
        assert "\n" not in str(caught.value)
        count += 1
    assert count >= 10_000


def test_sealed_files_of_another_content(made, tmp_path):
    """Whoever can compute a checksum gets an error of one line, or a model that is well formed."""
    rng, path, refused = np.random.default_rng(1), tmp_path / "sealed", 0
    for content in resealed(made[0].read_bytes(), rng, 1500):
        path.write_bytes(content)
        try:
            from_file(path, *read_sealed(path))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 1000


@pytest.mark.quick
def test_no_pickle_and_no_code_is_loaded():
    names = ("file", "description", "model")
    for name in names:
        with contextlib.closing(open(cj.__path__[0] + f"/frozen/{name}.py")) as file:
            text = file.read()
        assert not re.search(r"\b(pickle|eval|exec|allow_pickle)\b\(?", text.split('"""', 2)[2])
