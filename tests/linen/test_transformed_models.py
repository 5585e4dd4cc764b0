"""Layers inside scan, RNN, remat and vmap, and inside several: init, calibrate, train, freeze."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import KEY, QUICKLY, Block, Stack, assert_trained, normal

import compand_jax as cj
from compand_jax.linen.calibration import observe

OWN = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
SAME = {"variable_broadcast": "params", "split_rngs": {"params": False}}


class Nested(nn.Module):
    """Two times three blocks, by a scan in a scan; as a scan's body it takes a carry."""

    inner: dict
    outer: dict
    body: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        class Inner(nn.Module):
            body: type[nn.Module]
            axes: dict

            @nn.compact
            def __call__(self, x):
                scanned = nn.scan(self.body, length=3, **self.axes)
                return scanned(carries=True, name="inner")(x)

        return nn.scan(Inner, length=2, **self.outer)(self.body, self.inner, name="outer")(x)[0]


def rnn(cell):
    return nn.RNN(cell(4), name="rnn")


# The model, its input's shape, and how many values of the first site's input one call sees.
MODELS = {
    "scan": (lambda: Stack("scan"), (5, 4), 3 * 5 * 4),
    "scan_same": (lambda: Stack("same"), (5, 4), 3 * 5 * 4),
    "scan_in_scan": (lambda: Nested(OWN, OWN), (5, 4), 6 * 5 * 4),
    "scan_same_in_scan": (lambda: Nested(SAME, OWN), (5, 4), 6 * 5 * 4),
    "scan_same_in_scan_same": (lambda: Nested(SAME, SAME), (5, 4), 6 * 5 * 4),
    "remat_in_scans": (lambda: Nested(SAME, SAME, nn.remat(Block)), (5, 4), 6 * 5 * 4),
    "lstm": (lambda: rnn(nn.LSTMCell), (2, 5, 4), 5 * 2 * 4),
    "gru": (lambda: rnn(nn.GRUCell), (2, 5, 4), 5 * 2 * 4),
    "remat": (lambda: nn.remat(Block)(4), (5, 4), 5 * 4),
    "remat_lstm": (lambda: rnn(nn.remat(nn.LSTMCell)), (2, 5, 4), 5 * 2 * 4),
    "vmap": (lambda: Stack("vmap"), (3, 5, 4), 3 * 5 * 4),
}


VERSIONS = ("scan_same_in_scan_same", "lstm", "remat", "vmap")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.versions if n in VERSIONS else ()) for n in MODELS]
)
def test_init_calibrate_train_freeze(name):
    make, shape, count = MODELS[name]
    model, x = make(), normal(*shape)
    qmodel = cj.quantize_model(model, cj.QuantConfig(weight_bits=4, act_bits=4))
    variables = qmodel.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], model.init(KEY, x)["params"])
    flags = {"at_output": False, "activations": True, "moments": False}
    # Seen as often as it runs, whatever Flax traces besides.
    seen = observe(model, {"params": variables["params"]}, [x, x], {}, **flags)
    for histogram in seen.activations.values():
        assert histogram.counts.sum() == 2 * count

    qmodel, variables = qmodel.calibrate(variables, [x])
    assert set(qmodel.sites) == set(seen.activations)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(variables):
        def loss(trained):
            y = qmodel.apply(trained, x)
            return jnp.mean((y - jnp.flip(x, -1)) ** 2)

        value, gradients = jax.value_and_grad(loss)(variables)
        return value, gradients, jax.tree.map(lambda v, g: v - 0.1 * g, variables, gradients)

    losses = []
    for _ in range(8):
        loss, gradients, variables = step(variables)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert_trained(gradients["params"])

    frozen = cj.freeze(qmodel, variables, x)
    expected = jax.jit(qmodel.apply, compiler_options=QUICKLY)(variables, x)
    np.testing.assert_allclose(frozen.apply(x), expected, rtol=0, atol=1e-6)
