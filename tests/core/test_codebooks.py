"""What finds a value's place in a large codebook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import CASES

from compand_jax.core import _xla, codebooks


@pytest.mark.parametrize("case", [c for c in CASES if c[0] >= 5])
def test_no_bucket_holds_two_thresholds(case):
    # Of any scale and mu: only then does one comparison find the code.
    static = codebooks.Spec(*case)
    count = 4 * 2 ** (static.bits - static.signed)
    rng = np.random.default_rng(3)
    mu = np.concatenate([[0, 1, 255], 10 ** rng.uniform(-8, np.log10(255), 2000)])
    scale = np.concatenate([[1, 1.9999999, 2], 2 ** rng.uniform(-100, 127.9, 2000)])
    mu, scale = (jnp.asarray(values, jnp.float32)[:, None] for values in (mu, scale))

    @jax.jit
    def buckets(mu, scale):
        thresholds = codebooks.half_table(mu, scale, static)[1][:, 0]
        return _xla._buckets(thresholds, mu, scale, count)

    found = np.asarray(buckets(mu, scale))
    assert (np.diff(found) > 0).all()
    assert found.min() >= 0
    assert found.max() < count
