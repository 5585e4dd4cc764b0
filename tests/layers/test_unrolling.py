"""A layer as a matrix product: its second moments, against what the layer itself computes."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import drawn, normal

from compand_jax.layers.observation import Observer
from compand_jax.linen.interception import intercept_layers

LAYERS = {
    "dense": (nn.Dense(5), (7, 3, 4)),
    "dense-general": (nn.DenseGeneral((2, 3), axis=(1, -1)), (7, 4, 3, 5)),
    "conv": (nn.Conv(6, (3, 3)), (2, 5, 6, 3)),
    "conv-strides": (nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID"), (2, 7, 6, 3)),
    "conv-same-strides": (nn.Conv(4, (3, 3), strides=2), (2, 6, 7, 3)),
    "conv-pads": (nn.Conv(4, (3, 3), padding=((2, 0), (1, 1))), (2, 4, 5, 3)),
    "conv-int": (nn.Conv(4, 3, strides=2, padding=1), (2, 9, 3)),
    "conv-groups": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 5, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), (2, 5, 5, 4)),
    "conv-dilated": (nn.Conv(4, (3, 3), kernel_dilation=2), (2, 7, 8, 3)),
    "conv-input-dilated": (nn.Conv(4, (3, 3), (2, 1), ((1, 0), (2, 1)), (2, 3)), (2, 4, 4, 3)),
    "conv-circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), (2, 5, 5, 3)),
    "conv-causal": (nn.Conv(4, (3,), padding="CAUSAL", kernel_dilation=2), (2, 8, 3)),
    "conv-many-batches": (nn.Conv(4, (3, 3)), (2, 3, 4, 4, 3)),
}


def observed(layer, variables, x):
    observer = Observer(moments=lambda layer, x, shape: layer.unrolling.moments(x, shape))
    with intercept_layers(layer, observer) as intercepted:
        intercepted.apply(variables, x)
    return observer.layers[""].unrolling, observer.values("moments", "")


@pytest.mark.parametrize("name", LAYERS)
def test_the_moments_give_the_change_of_the_output(name):
    layer, shape = LAYERS[name]
    x = normal(*shape)
    variables = drawn(layer, x)
    unrolling, (moments,) = observed(layer, variables, x)
    kernel = variables["params"]["kernel"]
    change = normal(*kernel.shape, seed=1)
    changed = {"params": {**variables["params"], "kernel": kernel + change}}
    difference = np.asarray(layer.apply(changed, x) - layer.apply(variables, x), np.float64)
    rows, moments = (np.asarray(a, np.float64) for a in (unrolling.rows(change), moments))
    assert rows.shape[-1] == unrolling.inputs(kernel.shape) == moments.shape[-1]
    per_row = np.einsum("grk,gkl,grl->gr", rows, moments, rows).ravel()
    features = difference.reshape(-1, per_row.size) if "general" not in name else None
    assert per_row.sum() == pytest.approx(np.sum(difference**2), rel=1e-4)
    if features is not None:  # each row by itself, in the order of the scales
        np.testing.assert_allclose(per_row, np.sum(features**2, 0), rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_comes_back_from_its_rows(name):
    layer, shape = LAYERS[name]
    variables = drawn(layer, normal(*shape))
    unrolling, _ = observed(layer, variables, normal(*shape))
    kernel = variables["params"]["kernel"]
    np.testing.assert_array_equal(unrolling.weight(unrolling.rows(kernel), kernel.shape), kernel)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Embed(5, 3), jnp.arange(4)),
        (nn.ConvTranspose(3, (2, 2)), normal(1, 3, 3, 2)),
        (nn.ConvLocal(3, (2, 2)), normal(1, 3, 3, 2)),
        (nn.Einsum((4, 3), "bi,io->bo"), normal(2, 4)),
        (nn.DenseGeneral(3, batch_dims=(0,)), normal(2, 5, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_layers_are_not_unrolled(layer, x):
    observer = Observer()
    with intercept_layers(layer, observer) as intercepted:
        intercepted.apply(drawn(layer, x), x)
    assert observer.layers[""].unrolling is None
