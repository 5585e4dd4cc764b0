"""The encoder of the example, against the vectors of the PyTorch model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sentence_encoder import linen_encoder, nnx_encoder
from sentence_encoder.architecture import Architecture, read_architecture
from sentence_encoder.weights import import_bert, load_encoder, packaged_folder

TINY = Architecture(vocabulary=11, positions=8, kinds=2, width=8, hidden=12, heads=2, layers=1)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).with_name("sentence_vectors.npz")) as found:
        return dict(found)


@pytest.mark.encoder
@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_vectors_are_those_of_the_pytorch_model(reference, front):
    from sentence_encoder.sentences import Tokenizer

    folder = packaged_folder()
    sizes, variables = load_encoder(folder)
    tokens, mask = Tokenizer(folder)(reference["sentences"])
    if front == "linen":
        ours = jax.jit(linen_encoder.Encoder(sizes).apply)(variables, tokens, mask)
    else:
        ours = nnx.jit(nnx_encoder.with_params(sizes, variables["params"]))(tokens, mask)
    assert np.abs(np.asarray(ours) - reference["vectors"]).max() < 1e-5
    # A network that did not read its sentences would prove nothing.
    assert np.abs(reference["vectors"][0] - reference["vectors"][2]).max() > 0.1


def test_fronts_agree_and_padding_changes_nothing():
    tokens = jnp.array([[1, 5, 2, 0], [1, 7, 3, 2]], jnp.int32)
    mask = (tokens > 0).astype(jnp.int32)
    model = linen_encoder.Encoder(TINY)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, mask)
    apply = jax.jit(model.apply)
    vectors = apply(variables, tokens, mask)
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    of_nnx = nnx.jit(nnx_encoder.with_params(TINY, variables["params"]))(tokens, mask)
    np.testing.assert_allclose(of_nnx, vectors, atol=1e-6)
    filled_up = apply(variables, tokens.at[0, 3].set(9), mask)
    np.testing.assert_array_equal(filled_up, vectors)


def test_arrays_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"`arrays` must have every array .*embeddings.*are miss"):
        import_bert({}, TINY)


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(ValueError, match="encoder with model_type='bert', got 'roberta'"):
        read_architecture(tmp_path)


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'no_such_encoder' is not: pip install"):
        packaged_folder("no_such_encoder")
