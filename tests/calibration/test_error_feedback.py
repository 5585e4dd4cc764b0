"""Error feedback, against the definition with the inverse of what is left, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from compand_jax.calibration.error_feedback import round_with_feedback
from compand_jax.core.codebooks import Spec
from compand_jax.core.quantizers import fake_quantize

SPECS = (Spec(4), Spec(2, True, "midrise"))
N, ROWS, MU = 12, 5, 3.0


def problem(seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, N)) @ rng.normal(size=(N, N))  # correlated
    rows = rng.normal(size=(ROWS, N))
    return rows, inputs.T @ inputs, np.abs(rows).max(1) * 0.9


def plainly(rows, scales, spec):
    pairs = zip(rows, scales, strict=True)
    return np.stack([oracle.fake_quantize(row, MU, scale, *spec) for row, scale in pairs])


def errors(rows, quantized, moments):
    return np.einsum("rk,kl,rl->r", rows - quantized, moments, rows - quantized)


def by_definition(rows, moments, mu, scales, spec):
    """Rounds one input after the other, solving anew each time for those that are left."""
    moments = moments + 0.01 * np.trace(moments) / N * np.eye(N)
    order = list(np.argsort(-np.diag(moments)))
    rows, result = rows.copy(), np.zeros_like(rows)
    for step, k in enumerate(order):
        left = order[step + 1 :]
        for r, scale in enumerate(scales):
            result[r, k] = oracle.fake_quantize(rows[r, k : k + 1], mu, scale, *spec)[0]
            # The minimum of (e_k, e_left) H (e_k, e_left)^T over e_left.
            error = rows[r, k] - result[r, k]
            best = -np.linalg.solve(moments[np.ix_(left, left)], moments[left, k] * error)
            rows[r, left] -= best
    return result


def call(rows, moments, scales, spec, mu=MU):
    arrays = (jnp.asarray(a, jnp.float32) for a in (rows, moments, mu, scales))
    return np.asarray(round_with_feedback(*arrays, spec=spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_against_the_definition(spec, seed):
    rows, moments, scales = problem(seed)
    plain = plainly(rows, scales, spec)
    expected = by_definition(rows, moments, MU, scales, spec)
    better = errors(rows, expected, moments) < errors(rows, plain, moments)
    assert better.sum() >= 3
    expected = np.where(better[:, None], expected, plain)
    np.testing.assert_allclose(call(rows, moments, scales, spec), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_output_changes_less(spec):
    rows, moments, scales = problem()
    found = errors(rows, call(rows, moments, scales, spec), moments)
    plain = errors(rows, plainly(rows, scales, spec), moments)
    assert np.all(found <= plain * (1 + 1e-6))
    assert found.sum() < 0.7 * plain.sum()


@pytest.mark.quick
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_comes_out_are_levels(spec):
    rows, moments, scales = problem()
    rounded = jnp.asarray(call(rows, moments, scales, spec))
    quantize = functools.partial(fake_quantize, bits=spec.bits, grid=spec.grid)
    again = jax.jit(quantize)(rounded, MU, jnp.asarray(scales, jnp.float32)[:, None])
    np.testing.assert_array_equal(again, rounded)


@pytest.mark.parametrize(
    "moments", [np.diag(np.arange(N) + 1.0), np.zeros((N, N))], ids=["diagonal", "zero"]
)
def test_inputs_that_have_nothing_to_do_with_each_other(moments):
    rows, _, scales = problem()
    found = call(rows, moments, scales, SPECS[0])
    np.testing.assert_allclose(found, plainly(rows, scales, SPECS[0]), rtol=1e-6)
