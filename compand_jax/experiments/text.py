"""Tables, CSV and sizes, as all records and reports have them."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Returns a Markdown table of cells, the first row its header, aligned as text too.

    The first `text_columns` are flush left, the others right.

    >>> print(markdown_table([("site", "bits"), ("dense", "4")]))
    | site  | bits |
    |-------|-----:|
    | dense |    4 |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 2) if i < text_columns else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    )
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    r"""Returns rows as CSV, with a header; None is empty.

    Args:
      rows: of equal keys.
      columns: those keys in the order to write them; None is that of the first row.

    >>> to_csv([{"bits": 4, "sqnr": None}])
    'bits,sqnr\n4,\n'
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def size_text(count: int) -> str:
    """Returns a number of bytes in kB or MB, of 1000 and 1000000 bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def thin(rows: Sequence, most: int) -> list:
    """Returns at most `most` rows, evenly spread, the last among them.

    >>> thin(range(10), most=4)
    [1, 4, 6, 9]
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[(i + 1) * len(rows) // most - 1] for i in range(most)]
