"""Families that users register."""

import re

import pytest

import compand_jax as cj


class Square(cj.Compander):
    parameter = "strength"

    def compress(self, v, p):
        return v

    def expand(self, y, p):
        return y


class Nameless(Square):
    parameter = "scale"


TAKEN = Square()
cj.register_quantizer("taken_in_tests", TAKEN)


@pytest.mark.parametrize(
    ("name", "family", "match"),
    [
        ("mu_law", Square(), "`name` must be new, and the family in no use, got 'mu_law'"),
        ("other", TAKEN, "in no use, got 'other'"),
        ("No word", Square(), "`name` must be a word of lower-case letters"),
        ("other", Nameless(), "`family.parameter` must not be 'scale'"),
    ],
)
def test_wrong_values(name, family, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        cj.register_quantizer(name, family)


def test_a_class_is_no_family():
    with pytest.raises(TypeError, match="`family` must be an object of a subclass of Family"):
        cj.register_quantizer("other", Square)
