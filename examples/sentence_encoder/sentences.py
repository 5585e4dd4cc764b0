"""Sentences as tokens, and sentences to try an encoder on."""

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

_LENGTHS = (16, 32, 64, 128, 256)


class Tokenizer:
    """A model's own tokenizer, of the file `tokenizer.json` in its folder.

    Args:
      folder: The model's.
      longest: How many tokens of a sentence are kept.
    """

    def __init__(self, folder: str | Path, longest: int = 256) -> None:
        self._own = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._own.no_padding()
        self._own.enable_truncation(longest)

    def __call__(
        self, sentences: Sequence[str], length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and mask, both [sentences, length], int32.

        Args:
          sentences: Texts.
          length: What all are filled up to; the next of a few lengths, if none is given, so that
            a model is compiled few times.
        """
        found = [encoding.ids for encoding in self._own.encode_batch(list(sentences))]
        longest = max(map(len, found))
        if length is None:
            length = next((n for n in _LENGTHS if n >= longest), longest)
        tokens = np.zeros((len(found), length), np.int32)
        mask = np.zeros_like(tokens)
        for i, ids in enumerate(found):
            ids = ids[:length]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        return tokens, mask

    def batches(
        self, sentences: Sequence[str], size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields tokens, mask and the sentences' numbers, sentences of like length together.

        Every batch has `size` rows; one that is short is filled up with its last sentence.
        """
        lengths = [len(encoding.ids) for encoding in self._own.encode_batch(list(sentences))]
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), size):
            own = order[start : start + size]
            filled = np.concatenate([own, np.repeat(own[-1:], size - len(own))])
            tokens, mask = self([sentences[int(i)] for i in filled])
            yield tokens, mask, own


def python_topics() -> list[str]:
    """Returns the sentences of Python's own language reference, as `help()` shows it, in order.

    They are those of `pydoc_data.topics`, which every installation of Python has (PSF licence).
    """
    from pydoc_data.topics import topics

    return _sentences(topics[name] for name in sorted(topics))


def python_docstrings() -> list[str]:
    """Returns the sentences of the docstrings of Python's standard library, in order.

    They are read from its source, which an installation has (PSF licence); nothing is imported.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return _sentences(texts)


def _sentences(texts: Iterable[str]) -> list[str]:
    """Returns the sentences of paragraphs of prose, each once; code and tables are left out."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r">>>|::=|\+--|===|\*\*\*|----", paragraph):
                continue
            prose = re.sub(r"[*`\"_]|\[\d+\]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", prose):
                if _is_prose(sentence):
                    found.setdefault(sentence)
    return list(found)


def _is_prose(sentence: str) -> bool:
    words = re.findall(r"[A-Za-z]+", sentence)
    whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
    return whole and 4 <= len(words) <= 80 and sum(map(len, words)) > 0.65 * len(sentence)
