"""Tables, CSV and sizes of records."""

import itertools

import pytest

from compand_jax.experiments.text import markdown_table, size_text, thin, to_csv


@pytest.mark.quick
def test_thin_keeps_the_last_and_spreads_evenly():
    assert thin([1, 2], most=3) == [1, 2]
    kept = thin(range(1, 451), most=200)
    assert len(kept) == 200
    assert kept[-1] == 450
    assert {b - a for a, b in itertools.pairwise(kept)} == {2, 3}


@pytest.mark.quick
def test_tables_are_flush_left_for_text_and_right_for_numbers():
    rows = [("a", "site", "bits"), ("bcd", "dense", "4")]
    assert markdown_table(rows, text_columns=2) == (
        "| a   | site  | bits |\n|-----|-------|-----:|\n| bcd | dense |    4 |"
    )


@pytest.mark.quick
def test_csv_has_its_columns_and_no_others():
    assert to_csv([{"bits": 4, "sqnr": None}], ["sqnr", "bits"]) == "sqnr,bits\n,4\n"
    with pytest.raises(ValueError, match="fields not in fieldnames: 'rules'"):
        to_csv([{"bits": 4, "rules": []}], ["bits"])


@pytest.mark.quick
def test_sizes_are_in_thousands():
    assert [size_text(count) for count in (999, 123_456, 1_000_000)] == [
        "1.0 kB", "123.5 kB", "1.00 MB"]  # fmt: skip
