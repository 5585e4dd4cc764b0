"""The search over cumulative sums against the one over all values."""

import jax.numpy as jnp
import numpy as np
import pytest

from compand_jax.calibration.histogram_search import best_scales_of_histograms, cumulate
from compand_jax.calibration.samples import sample_from_weights
from compand_jax.calibration.scale_search import best_scales
from compand_jax.core.spec import Spec

SPECS = [Spec(2), Spec(4), Spec(8), Spec(4, False), Spec(8, False), Spec(2, True, "midrise")]


@pytest.fixture(scope="module")
def sample():
    x = np.random.default_rng(0).standard_t(4, 20_000).astype(np.float32)
    return sample_from_weights([np.append(x, np.zeros(100, np.float32))])


@pytest.mark.parametrize("descents", [0, 3])
@pytest.mark.parametrize("mu", [0.0, 1e-6, 3.0, 255.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_both_searches_find_the_same(sample, spec, mu, descents):
    starts = float(sample.absmax[0]) * np.array([[[0.1], [0.3]], [[0.6], [1.1]]])
    mus = np.array([mu])
    (scale,), (error,) = best_scales_of_histograms(cumulate(sample), mus, starts, spec, descents)
    found = [
        best_scales(sample, jnp.asarray(mus, jnp.float32), jnp.asarray(grid, jnp.float32), spec,
                    descents)
        for grid in starts
    ]  # fmt: skip
    scales, errors = np.array(found)[..., 0].T
    assert error == pytest.approx(errors.min(), rel=1e-3)
    assert scale == pytest.approx(scales[errors.argmin()], rel=3e-3)


@pytest.mark.parametrize(("spec", "inner"), [(Spec(2), True), (Spec(2, True, "midrise"), False)])
def test_a_value_at_a_threshold(sample, spec, inner):
    # The threshold of both at scale 1 is 1/2.
    one = sample._replace(values=jnp.array([[0.0, 0.5]]), weights=jnp.array([[0.0, 1.0]]))
    mus, starts = np.zeros(1), np.ones((1, 1, 1))
    _, (error,) = best_scales_of_histograms(cumulate(one), mus, starts, spec, 0)
    level = 0.0 if inner else 0.75
    assert error == pytest.approx((0.5 - level) ** 2)
