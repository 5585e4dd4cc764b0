"""A dozen whole models whose weights are of least squared error, and theirs alone.

The weights are quantized a second time, by NumPy in float64, and the plain model is run on them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from small_models import QUICKLY
from whole_models import WHOLES, assert_close, evaluated, initialized

import compand_jax as cj

BITS = 3
SHAKEN = 0.03  # what a search may miss by: of a few weights, the error is no smooth function


@pytest.fixture(autouse=True)
def _jax_as_it_is_by_default():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def weight_path(params, site):
    paths = [(*site.split("/"), name) for name in ("kernel", "embedding")]
    (path,) = (path for path in paths if path in params)
    return path


def quantized_by_numpy(w, mu, scale):
    w, scale = np.asarray(w, np.float64), np.asarray(scale, np.float64)
    return oracle.fake_quantize(w, float(mu), scale, BITS, True, "midtread")


def least_error(w, granularity):
    """Returns the least squared error that a table of mus and scales has."""
    w = np.asarray(w, np.float64)
    rows = w.reshape(-1, w.shape[-1]).T if granularity == "channel" else w.reshape(1, -1)
    top = np.abs(rows).max(1, keepdims=True)
    errors = []
    for mu in (0, 0.3, 1, 2, 4, 8, 16, 32):
        each = [
            ((quantized_by_numpy(rows, mu, part * top) - rows) ** 2).sum(1)
            for part in np.linspace(0.3, 1, 29)
        ]
        errors.append(np.min(each, 0).sum())
    return min(errors)


@pytest.mark.parametrize("name", WHOLES)
def test_weights_of_least_error_in_the_plain_model(name):
    found, variables = initialized(name)
    granularity = ("tensor", "channel")[list(WHOLES).index(name) % 2]
    config = cj.QuantConfig(weight_bits=BITS, act_bits=4, weight_granularity=granularity)
    qmodel, calibrated = cj.quantize_model(found.model, config).calibrate(variables, found.batches)
    params = flatten_dict(variables["params"])
    for site, own in qmodel.quantizers(calibrated).items():
        path = weight_path(params, site)
        w = params[path]
        quantized = quantized_by_numpy(w, own["weight_mu"], own["weight_scale"])
        params[path] = jnp.asarray(quantized, w.dtype)
        if np.any(w):
            error = ((quantized - np.asarray(w, np.float64)) ** 2).sum()
            assert error <= (1 + SHAKEN) * least_error(w, granularity), site
    by_hand = {**variables, "params": unflatten_dict(params)}

    sites = {key: dataclasses.replace(site, act_bits=None) for key, site in qmodel.sites.items()}
    config = dataclasses.replace(config, act_bits=None)
    weights_alone = cj.quantize_model(found.model, config, sites=sites)
    run = evaluated(weights_alone, found, compiler_options=QUICKLY)
    plain = evaluated(found.model, found, compiler_options=QUICKLY)
    for args in found.batches:
        assert_close(run(calibrated, *args), plain(by_hand, *args), found.rounding)
