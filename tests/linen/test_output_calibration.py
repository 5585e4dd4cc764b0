"""Calibrating by the layers' outputs, and error feedback, on whole models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import Net, SetUp, drawn, normal

import compand_jax as cj
from compand_jax.core.quantizers import fake_quantize

MIX = np.float32(np.linalg.matrix_power(np.eye(4) + 0.4, 3))  # makes inputs correlated
DENSE_BATCHES = [normal(40, 4, seed=i) @ MIX for i in range(2)]
IMAGES = jnp.cumsum(normal(4, 6, 6, 4), 1)
MODELS = {
    "dense": (SetUp(), DENSE_BATCHES),
    "conv": (Net(nn.Conv(6, (3, 3), strides=2)), [IMAGES]),
    "depthwise": (Net(nn.Conv(4, (3, 3), feature_group_count=4)), [IMAGES]),
}


def calibrate(model, batches, variables=None, granularity="channel", **arguments):
    config = cj.QuantConfig(weight_bits=3, act_bits=None, weight_granularity=granularity)
    variables = drawn(model, batches[0]) if variables is None else variables
    return variables, *cj.quantize_model(model, config).calibrate(variables, batches, **arguments)


def first_layers_error(name, **arguments):
    """Returns the squared change of the first layer's output, the sum over the batches."""
    model, batches = MODELS[name]
    variables, qmodel, quantized = calibrate(model, batches, **arguments)

    def output(apply, variables, x):
        _, seen = apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        layers = seen["intermediates"]
        return layers["first" if name == "dense" else "layer"]["__call__"][0]

    pairs = [(output(model.apply, variables, x), output(qmodel.apply, quantized, x))
             for x in batches]  # fmt: skip
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_the_layers_output_changes_less(name, granularity):
    plain = first_layers_error(name, granularity=granularity)
    by_output = first_layers_error(name, granularity=granularity, calibration="output")
    fed_back = first_layers_error(
        name, granularity=granularity, calibration="output", error_feedback=True
    )
    assert fed_back <= 1.0001 * by_output < plain


@pytest.mark.parametrize("name", ["dense", "depthwise"])
def test_kernels_are_levels_after_error_feedback(name):
    model, batches = MODELS[name]
    variables, qmodel, quantized = calibrate(model, batches, error_feedback=True)
    for site, found in qmodel.quantizers(quantized).items():
        kernel = quantized["params"][site]["kernel"]
        assert np.any(kernel != variables["params"][site]["kernel"])
        quantize = jax.jit(lambda x, mu, scale: fake_quantize(x, mu, scale, bits=3))
        again = quantize(kernel, found["weight_mu"], found["weight_scale"])
        np.testing.assert_allclose(again, kernel, rtol=1e-6)
        np.testing.assert_array_equal(
            quantized["params"][site]["bias"], variables["params"][site]["bias"]
        )


class Normed(nn.Module):
    """A layer under weight normalization, one that is masked, and an embedding."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(5, 4, name="embed")(ids)
        x = nn.WeightNorm(nn.Dense(4, name="normed"))(x)
        return nn.Conv(3, (1,), mask=jnp.eye(4)[None, :, :3], name="masked")(x)


def test_weights_that_are_not_used_as_stored_are_left_alone():
    ids = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 5
    variables, _, quantized = calibrate(Normed(), [ids], calibration="output", error_feedback=True)
    jax.tree.map(np.testing.assert_array_equal, quantized["params"], variables["params"])


def test_boxed_parameters_stay_boxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model, batches = nn.Dense(3, kernel_init=init), DENSE_BATCHES
    variables = model.init(jax.random.key(0), batches[0])
    _, _, quantized = calibrate(model, batches, variables, error_feedback=True)
    assert quantized["params"]["kernel"].names == ("in", "out")
    assert np.any(quantized["params"]["kernel"].value != variables["params"]["kernel"].value)


def test_params_keep_their_container_and_their_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = freeze(drawn(SetUp(), DENSE_BATCHES[0])["params"])
    arguments = {"error_feedback": True, "calibration": "absmax"}
    for given in (params, jax.device_put(params, everywhere)):
        variables = {"params": given}
        _, _, quantized = calibrate(SetUp(), DENSE_BATCHES, variables, **arguments)
        found = quantized["params"]
        assert isinstance(found, FrozenDict)
        for site in ("first", "second"):
            assert np.any(found[site]["kernel"] != params[site]["kernel"])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
            assert a.sharding == b.sharding
            assert a.committed == b.committed


class Counted:
    """Batches that can be gone through again, and count how often they are."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(DENSE_BATCHES)


def test_what_can_be_gone_through_again_is_not_kept():
    class BatchNormed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    batches = Counted()
    variables = drawn(BatchNormed(), DENSE_BATCHES[0])
    config = cj.QuantConfig(weight_bits=3, act_bits=3)
    found = [
        cj.quantize_model(BatchNormed(), config).calibrate(variables, given, batch_stats=True)[1]
        for given in (batches, iter(DENSE_BATCHES))
    ]
    assert batches.passes == 2
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argument", "value"), [("percentile", 0), ("percentile", 101.0), ("mu", -1.0), ("mu", 256)]
)
def test_arguments_out_of_range(argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}` must be .*, got {value}"):
        calibrate(SetUp(), DENSE_BATCHES, **{argument: value})
