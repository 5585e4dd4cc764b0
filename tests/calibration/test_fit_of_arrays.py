"""`cj.fit`: mu and scale of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import compand_jax as cj


def error(x, mu, scale, spec):
    """The mean squared error, in float64, by the oracle."""
    x = np.asarray(x, np.float64)
    q = oracle.fake_quantize(x, np.float64(mu), np.asarray(scale, np.float64), **spec)
    return np.mean((x - q) ** 2)


# mu*, c*, MSE* of sources of unit variance, by quadrature.
OPTIMA = [
    ("normal", 3, "midtread", 0.749, 2.018, 0.044448),
    ("normal", 4, "midtread", 1.533, 2.623, 0.0111188),
    ("laplace", 4, "midtread", 4.569, 4.143, 0.0180505),
    ("normal", 2, "midrise", 0.372, 2.094, 0.117773),
    ("laplace", 4, "midrise", 5.569, 4.896, 0.0160698),
]


def quantiles(source, n=200_001):
    p = (np.arange(n) + 0.5) / n
    if source == "normal":
        return np.asarray(jax.scipy.special.ndtri(jnp.asarray(p, jnp.float32)))
    b = np.sqrt(0.5)
    tail = np.minimum(p, 1 - p)
    return (np.sign(p - 0.5) * -b * np.log(2 * tail)).astype(np.float32)


@pytest.mark.quick
@pytest.mark.parametrize(("source", "bits", "grid", "mu", "scale", "mse"), OPTIMA)
def test_optimum_of_known_sources(source, bits, grid, mu, scale, mse):
    x = quantiles(source)
    found_mu, found_scale = cj.fit(x, bits=bits, grid=grid)
    assert found_mu.shape == found_scale.shape == ()
    found = error(x, found_mu, found_scale, oracle.spec((bits, True, grid)))
    assert found == pytest.approx(mse, rel=3e-3)
    np.testing.assert_allclose(found_scale, scale, rtol=0.05)
    np.testing.assert_allclose(found_mu, mu, rtol=0.25)


def test_goes_with_the_quantizers():
    x = jax.random.normal(jax.random.key(0), (64, 6)) * jnp.arange(1, 7)[None].astype(jnp.float32)
    whole = cj.fake_quantize(x, *cj.fit(x, bits=4), bits=4)
    mu, scale = cj.fit(x, bits=4, axis=-1)
    assert (mu.shape, scale.shape) == ((), (1, 6))
    own = cj.fake_quantize(x, mu, scale, bits=4)
    assert jnp.sum((x - own) ** 2) < jnp.sum((x - whole) ** 2)


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 1, 1)), (-1, (1, 1, 5)), ((0, -1), (3, 1, 5)),
                                             ((), ()), (None, ())])  # fmt: skip
def test_axes_that_keep_a_scale(axis, shape):
    x = jax.random.normal(jax.random.key(1), (3, 40, 5))
    _, scale = cj.fit(x, bits=3, axis=axis, calibration="absmax")
    assert scale.shape == shape
    reduced = tuple(i for i in range(3) if not shape or shape[i] == 1)
    wanted = np.max(np.abs(np.asarray(x)), axis=reduced, keepdims=bool(shape))
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)


def test_without_a_sign_negative_values_count_as_zero():
    x = jax.random.normal(jax.random.key(2), (500,))
    for axis in (None, -1):
        of_all, of_positive = (
            cj.fit(values[:, None], bits=3, signed=False, axis=axis)
            for values in (x, jnp.maximum(x, 0))
        )
        assert [v.tolist() for v in of_all] == [v.tolist() for v in of_positive]
    mu, scale = cj.fit(x, bits=3, signed=False)
    case = oracle.spec((3, False, "midtread"))
    best = error(x, mu, scale, case)
    for other_mu, other_scale in ((mu, 1.1 * scale), (mu, 0.9 * scale), (0.0, scale)):
        assert best <= error(x, other_mu, other_scale, case)


@pytest.mark.quick
def test_mu_can_be_held():
    x = quantiles("normal", 20_001)
    mu, scale = cj.fit(x, bits=4, mu=0.0)
    assert mu == 0
    uniform = error(x, 0.0, scale, oracle.spec((4, True, "midtread")))
    assert uniform == pytest.approx(0.012889 * np.mean(x.astype(np.float64) ** 2), rel=5e-3)


@pytest.mark.quick
def test_percentile():
    x = jnp.arange(1, 101, dtype=jnp.float32)
    _, scale = cj.fit(x, bits=4, calibration="percentile", percentile=90)
    assert float(scale) == pytest.approx(90, rel=2e-3)


@pytest.mark.quick
def test_types():
    x = np.linspace(-1, 1, 100)
    for dtype in (np.float64, np.float16, jnp.bfloat16):
        mu, scale = cj.fit(x.astype(dtype), bits=4)
        assert mu.dtype == scale.dtype == jnp.float32


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration": "output"}, ValueError, "`calibration` must be one of mse, absmax"),
        ({"percentile": 0}, ValueError, "`percentile` must be in (0, 100], got 0"),
        ({"mu": 256.0}, ValueError, "`mu` must be None or from 0 to 255, got 256.0"),
        ({"bits": 9}, ValueError, "`bits` must be an integer from 1 to 8, got 9"),
        ({"axis": 2}, ValueError, "`axis` must be of the array's 2 axes, got 2"),
        ({"axis": ("a",)}, TypeError, "`axis` must be None, an integer or several, got ('a',)"),
        ({"x": np.ones(3, int)}, TypeError, "`x` must be floating, got int"),
        ({"x": np.ones((0, 3))}, ValueError, "`x` must have values, got shape (0, 3)"),
        ({"x": np.array([1, np.nan])}, ValueError, "`x` must be finite in float32, got NaN or inf"),
    ],
)
def test_errors(arguments, error, message):
    given = {"x": np.ones((2, 2), np.float32), "bits": 4} | arguments
    with pytest.raises(error) as caught:
        cj.fit(given.pop("x"), **given)
    assert str(caught.value).startswith(message)


@pytest.mark.quick
def test_traced():
    with pytest.raises(TypeError, match="`x` must be an array with values, got a tracer: call fit"):
        jax.jit(lambda x: cj.fit(x, bits=4))(jnp.ones(3))


@pytest.mark.quick
@pytest.mark.quick
def test_the_largest_numbers_have_a_finite_scale():
    mu, scale = cj.fit(jnp.array([1e38, 3e38], jnp.float32), bits=4)
    assert jnp.all(jnp.isfinite(cj.fake_quantize(jnp.float32(3e38), mu, scale, bits=4)))
