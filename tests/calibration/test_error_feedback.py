"""Error feedback, against the definition with the inverse of what is left, in float64."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from compand_jax.calibration.error_feedback import round_with_feedback
from compand_jax.core.quantizers import fake_quantize
from compand_jax.core.spec import Spec

SPECS = (Spec(4), Spec(2, True, "midrise"))
N, ROWS, MU = 12, 5, 3.0


def problem(seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, N)) @ rng.normal(size=(N, N))  # correlated
    rows = rng.normal(size=(ROWS, N))
    return rows, inputs.T @ inputs, np.abs(rows).max(1) * 0.9


def plainly(rows, scales, spec):
    pairs = zip(rows, scales, strict=True)
    return np.stack([oracle.fake_quantize(row, MU, scale, *spec[:3]) for row, scale in pairs])


def errors(rows, quantized, moments):
    return np.einsum("rk,kl,rl->r", rows - quantized, moments, rows - quantized)


def by_definition(rows, moments, mu, scales, spec):
    """Rounds one input after the other, solving anew each time for those that are left."""
    n = len(moments)
    moments = moments + 0.01 * np.trace(moments) / n * np.eye(n)
    order = list(np.argsort(-np.diag(moments)))
    rows, result = rows.copy(), np.zeros_like(rows)
    for step, k in enumerate(order):
        left = order[step + 1 :]
        for r, scale in enumerate(scales):
            result[r, k] = oracle.fake_quantize(rows[r, k : k + 1], mu, scale, *spec[:3])[0]
        # The minimum of (e_k, e_left) H (e_k, e_left)^T over e_left, for an error of 1.
        best = -np.linalg.solve(moments[np.ix_(left, left)], moments[left, k])
        rows[:, left] -= (rows[:, k] - result[:, k])[:, None] * best
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


@pytest.mark.parametrize("n", [128, 200])
@pytest.mark.parametrize("spec", [SPECS[1], Spec(8)], ids=str)
def test_several_blocks_against_the_definition(spec, n):
    rng = np.random.default_rng(n)
    inputs = rng.normal(size=(3 * n, n)) + rng.normal(size=(3 * n, 1))
    rows = rng.normal(size=(ROWS, n))
    moments, scales = inputs.T @ inputs, np.abs(rows).max(1) * 0.9
    found = call(rows, moments, scales, spec)
    expected = by_definition(rows, moments, MU, scales, spec)
    # A value within float32's rounding of a threshold takes those after it along.
    assert np.isclose(found, expected, rtol=1e-5, atol=1e-6).mean() > 0.95
    found, expected = (errors(rows, a, moments) for a in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert expected.sum() < 0.7 * errors(rows, plainly(rows, scales, spec), moments).sum()


def test_wide_layers_take_seconds():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2048, 1024)).astype(np.float32)
    rows, start = rng.normal(size=(1024, 1024)), time.process_time()
    call(rows, inputs.T @ inputs, np.full(1024, 3.0), Spec(8))
    assert time.process_time() - start < 15  # input by input over the whole kernel: 47


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
