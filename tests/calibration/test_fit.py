"""mu and scale from data, against an exhaustive search in float64 on the raw values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import special, stats

from compand_jax.calibration import fit as fit_module
from compand_jax.calibration import samples
from compand_jax.calibration.fit import Group, fit_groups
from compand_jax.calibration.samples import histogram, merge_histograms, sample_from_weights
from compand_jax.core.spec import Spec

SIZE = 10_000
P = (np.arange(SIZE) + 0.5) / SIZE
NORMAL = special.ndtri(P)
SOURCES = {
    "gaussian": NORMAL,
    "laplacian": stats.laplace.ppf(P) / np.sqrt(2),
    "uniform": 2 * P - 1,
    "relu": np.maximum(NORMAL, 0),
    "student": stats.t(3).ppf(P),
    "bimodal": np.concatenate([0.1 * NORMAL[::2] - 1, 0.3 * NORMAL[::2] + 2]),
    "constant": np.full(SIZE, 0.1),
    "zero": np.zeros(SIZE),
}
SPECS = (Spec(4), Spec(3), Spec(2, True, "midrise"), Spec(4, False))
FOUR = SPECS[0]
MUS = np.expm1(np.linspace(0, np.log(256), 200))
EACH_SOURCE = pytest.mark.parametrize("name", SOURCES)


def source(name, size=None):
    return np.asarray(SOURCES[name] if size is None else SOURCES[name][:: SIZE // size], np.float32)


def sample(x, spec=FOUR, channel_axes=()):
    if channel_axes:
        return sample_from_weights([jnp.asarray(x)], channel_axes)
    seen = jax.device_get(jax.jit(histogram)(jnp.asarray(x)))
    return samples.sample_from_histogram(seen, spec.signed)


def fit_group(group_samples, specs, *, uniform=False, **kwargs):
    (fit,) = fit_groups([Group(group_samples, specs, 0.0 if uniform else None)], **kwargs)
    return fit


def squared_error(x, mu, scale, spec):
    """Returns the error on the raw values; where unsigned, negative ones are none of its."""
    x = x if spec.signed else np.maximum(x, 0)
    return np.sum((x - oracle.fake_quantize(x, mu, float(scale), *spec[:3])) ** 2)


def exhaustive(x, spec, mus=MUS, scales=200):
    """Returns the squared error at every mu and scale, from sums between the thresholds."""
    magnitudes = np.sort(np.abs(x) if spec.signed else np.maximum(x, 0)).astype(np.float64)
    moments = [np.append(0, np.cumsum(magnitudes**power)) for power in range(3)]
    errors = []
    for mu in mus:
        levels, thresholds = oracle.codebook(mu, 1.0, *spec[:3])
        scale = magnitudes[-1] * np.geomspace(0.02, 1.3, scales)[:, None]
        levels, thresholds = scale * levels[levels >= 0], scale * thresholds[thresholds > 0]
        inner = np.searchsorted(magnitudes, thresholds)
        bounds = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(x))))
        n, first, second = (np.diff(moment[bounds]) for moment in moments)
        errors.append(np.sum(second - 2 * levels * first + levels**2 * n, 1))
    return np.array(errors)


@EACH_SOURCE
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}{'u' * (not s.signed)}-{s.grid}")
def test_the_fit_is_the_best_of_a_fine_grid(name, spec):
    x = source(name)
    mu, (scale,), (relative,) = fit_group([sample(x, spec)], [spec])
    error = squared_error(x, mu, scale[0], spec)
    used = x if spec.signed else np.maximum(x, 0)
    power = max(np.sum(used.astype(np.float64) ** 2), 1e-30)
    errors = exhaustive(x, spec) if name != "zero" else np.array([[error]])
    assert error <= 1.001 * errors.min() + 1e-9 * power
    assert error <= 1.001 * errors[0].min() + 1e-9 * power  # uniform levels
    assert 0 <= mu <= 255
    if name != "zero":
        # The spread within a bin, up to (1/1024)^2/3 of the power, is not in its own estimate.
        assert relative == pytest.approx(error / power, rel=1e-3, abs=1e-6)


@EACH_SOURCE
def test_the_fit_is_never_worse_than_the_uniform_one(name):
    x = source(name)
    mu, (scale,), _ = fit_group([sample(x)], [FOUR])
    zero, (uniform_scale,), _ = fit_group([sample(x)], [FOUR], uniform=True)
    assert zero == 0
    error, uniform = (squared_error(x, m, s[0], FOUR) for m, s in ((mu, scale), (0, uniform_scale)))
    assert error <= uniform * (1 + 1e-5) + 1e-10 * np.sum(x.astype(np.float64) ** 2)
    if name in ("constant", "zero"):
        assert mu == 0  # nothing to gain
        assert float(scale[0]) == pytest.approx(0.1 if name == "constant" else 1, rel=1e-6)


# Source, quantizer, and by quadrature the best mu, the best scale and their MSE.
OPTIMA = [
    ("gaussian", Spec(3), 0.749, 2.018, 0.044448),
    ("gaussian", Spec(4), 1.533, 2.623, 0.0111188),
    ("gaussian", Spec(5), 2.325, 3.106, 0.0028803),
    ("laplacian", Spec(3), 2.157, 2.786, 0.069920),
    ("laplacian", Spec(4), 4.569, 4.143, 0.0180505),
    ("laplacian", Spec(5), 7.201, 5.377, 0.0047547),
    ("gaussian", Spec(2, True, "midrise"), 0.372, 2.094, 0.117773),
    ("gaussian", Spec(3, True, "midrise"), 1.055, 2.562, 0.034993),
    ("gaussian", Spec(4, True, "midrise"), 1.775, 2.955, 0.0098695),
    ("laplacian", Spec(2, True, "midrise"), 1.761, 2.756, 0.180448),
    ("laplacian", Spec(4, True, "midrise"), 5.569, 4.896, 0.0160698),
]


@functools.cache
def large_sample(name):
    p = (np.arange(400_000) + 0.5) / 400_000
    x = special.ndtri(p) if name == "gaussian" else stats.laplace.ppf(p) / np.sqrt(2)
    return sample(np.asarray(x, np.float32))


@pytest.mark.parametrize(("name", "spec", "mu", "scale", "mse"), OPTIMA)
def test_optima_of_known_sources(name, spec, mu, scale, mse):
    found, (scales,), (error,) = fit_group([large_sample(name)], [spec])
    assert found == pytest.approx(mu, rel=0.05)
    assert float(scales[0]) == pytest.approx(scale, rel=0.01)
    assert error == pytest.approx(mse, rel=4e-3)  # the sample has no tails beyond 1/800,000


def test_absmax_keeps_the_largest_magnitude():
    x = source("laplacian")
    mu, (scale,), _ = fit_group([sample(x)], [FOUR], calibration="absmax")
    top = np.abs(x).max()
    assert float(scale[0]) == top
    best = min(squared_error(x, m, top, FOUR) for m in MUS)
    assert squared_error(x, mu, top, FOUR) <= 1.001 * best


def test_tensors_that_share_a_mu():
    xs = [source(name, 2000) for name in ("gaussian", "laplacian", "student")]
    mu, scales, _ = fit_group([sample(x) for x in xs], [FOUR] * 3)
    grids = [exhaustive(x, FOUR).min(1) / np.sum(x.astype(np.float64) ** 2) for x in xs]
    found = sum(
        squared_error(x, mu, scale[0], FOUR) / np.sum(x.astype(np.float64) ** 2)
        for x, scale in zip(xs, scales, strict=True)
    )
    assert found <= 1.001 * np.sum(grids, 0).min()


def test_channels_have_scales_of_their_own_and_one_mu():
    sizes = np.float32([0.01, 1, 30, 0])
    x = np.stack([size * source(name, 1000) for size, name in zip(sizes, SOURCES, strict=False)])
    three = Spec(3)
    mu, (scale,), (relative,) = fit_group([sample(x.T, channel_axes=(-1,))], [three])
    assert scale.shape == (4,)
    assert float(scale[3]) == 1  # all zero
    errors = [squared_error(row, mu, s, three) for row, s in zip(x, scale, strict=True)]
    for row, s in zip(x[:3], scale, strict=False):
        alone = exhaustive(row, three, mus=[mu], scales=2000).min()
        assert squared_error(row, mu, s, three) <= 1.001 * alone
    assert relative == pytest.approx(sum(errors) / np.sum(x.astype(np.float64) ** 2), rel=1e-3)


@pytest.mark.parametrize("kind", ["tensor", "channel", "output"])
def test_the_fit_does_not_depend_on_the_unit(kind):
    x = source("gaussian", 1000)

    def error(factor):
        scaled = np.float32(factor) * x
        if kind == "output":
            moments = np.full((1, 1, 1), factor, np.float32)
            given = samples.sample_from_moments(jnp.asarray(scaled)[None, :, None], moments, False)
        else:
            given = sample(scaled[:, None], channel_axes=(-1,) if kind == "channel" else ())
        mu, (scale,), (relative,) = fit_group([given], [FOUR])
        error = squared_error(scaled / factor, mu, scale[0] / factor, FOUR)
        assert relative == pytest.approx(error / np.sum(x**2.0), rel=1e-2)
        return error

    assert [error(1e-30), error(1e30)] == pytest.approx([error(1.0)] * 2, rel=1e-3)


def test_eight_bits():
    x, eight = source("laplacian"), Spec(8)
    mu, (scale,), _ = fit_group([sample(x)], [eight])
    errors = exhaustive(x, eight, mus=MUS[::10], scales=60)
    assert squared_error(x, mu, scale[0], eight) <= 1.001 * errors.min()


@pytest.mark.parametrize("percentile", [50.0, 97.0, 100.0])
def test_percentile_of_a_tensor_and_of_channels(percentile):
    x = np.stack([source("student", 500), 3 * source("laplacian", 500)])
    channels, tensor = (sample_from_weights([jnp.asarray(x)], axes) for axes in ((-2,), ()))
    arguments = {"calibration": "percentile", "percentile": percentile}
    _, (scales,), _ = fit_group([channels], [FOUR], **arguments)
    _, (scale,), _ = fit_group([tensor], [FOUR], **arguments)
    expected = np.percentile(np.abs(x), percentile, axis=1, method="inverted_cdf")
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    expected = np.percentile(np.abs(x), percentile, method="inverted_cdf")
    np.testing.assert_allclose(scale, expected, rtol=2e-3)  # to the width of a bin


def test_weights_of_other_shapes_compile_once():
    tensors = [source("student", size).reshape(shape)
               for size, shape in ((2_500, (25, 4, 25)), (5_000, (50, 100)))]  # fmt: skip
    compiled = samples._jitted_histogram
    compiled.clear_cache()
    found = [sample_from_weights([x]) for x in tensors]
    assert compiled._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, found, [sample(x) for x in tensors])


def test_percentile_that_is_zero_gives_way_to_the_largest_magnitude():
    x = np.zeros(100, np.float32)
    x[0] = 2.0
    _, (scale,), _ = fit_group([sample(x)], [FOUR], calibration="percentile", percentile=90.0)
    assert float(scale[0]) == 2


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "channel"])
def test_the_least_error_of_a_layers_output(per_row):
    three = Spec(3)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 3, 6)).astype(np.float32)  # two groups of three
    inputs = rng.normal(size=(2, 50, 6)) @ rng.normal(size=(2, 6, 6))
    moments = np.einsum("gti,gtj->gij", inputs, inputs)
    given = samples.sample_from_moments(jnp.asarray(rows), np.float32(moments), per_row)
    mu, (scales,), (relative,) = fit_group([given], [three])

    def errors(mu, scale):
        e = rows - oracle.fake_quantize(rows, mu, scale, *three[:3])
        return np.einsum("gri,gij,grj->gr", e, moments, e)

    top = np.abs(rows).max()
    grid = np.array([[errors(m, s) for s in top * np.geomspace(0.1, 1.3, 60)] for m in MUS[::4]])
    best = grid.min(1).sum((1, 2)).min() if per_row else grid.sum((2, 3)).min()
    found = errors(mu, np.asarray(scales, np.float64).reshape(2, 3, 1) if per_row else scales[0])
    assert found.sum() <= 1.001 * best
    power = np.einsum("gri,gij,grj", rows, moments, rows)
    assert relative == pytest.approx(found.sum() / power, rel=1e-3)


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("draw", [np.random.Generator.normal, np.random.Generator.uniform])
def test_mu_of_many_products_is_that_of_some_rows(monkeypatch, per_row, draw):
    rng = np.random.default_rng(0)
    rows = draw(rng, size=(2, 128, 96)).astype(np.float32)
    inputs = rng.normal(size=(2, 400, 96)) * np.geomspace(0.3, 3, 96)
    moments = np.einsum("gti,gtj->gij", inputs, inputs)
    given = samples.sample_from_moments(jnp.asarray(rows), np.float32(moments), per_row)
    assert [len(part) for part in given.some_rows(given.products // 4)] == [
        64, 2, 64 if per_row else 1, 64 if per_row else 1,
    ]  # fmt: skip
    group = Group([given], [FOUR])
    monkeypatch.setattr(fit_module, "FEW_PRODUCTS", 0)  # as of large tensors
    (of_all,) = fit_groups([group])
    (uniform,) = fit_groups([group._replace(mu=0.0)])
    monkeypatch.setattr(fit_module, "_MANY_PRODUCTS", given.products - 1)
    monkeypatch.setattr(fit_module, "_ENOUGH_PRODUCTS", given.products // 4)
    (found,) = fit_groups([group])
    assert found.scales[0].shape == of_all.scales[0].shape
    assert found.errors <= 1.03 * of_all.errors  # so few weights make a rough curve of errors
    assert found.errors <= uniform.errors
    scales = found.scales[0].reshape((2, 128, 1) if per_row else ())
    e = rows - oracle.fake_quantize(rows, found.mu, scales, *FOUR[:3])
    relative = np.einsum("gri,gij,grj", e, moments, e)
    relative /= np.einsum("gri,gij,grj", rows, moments, rows)
    assert found.errors == pytest.approx(relative, rel=1e-3)


def test_mu_that_is_held():
    x = source("gaussian")
    (fit,) = fit_groups([Group([sample(x)], [FOUR], 30.0)])
    assert fit.mu == 30
    error = squared_error(x, 30.0, fit.scales[0][0], FOUR)
    assert error <= 1.001 * exhaustive(x, FOUR, mus=[30.0]).min()


# Histograms


def test_a_histogram_counts_by_sign_and_magnitude():
    x = np.float32([0.0, 1.0, -1.0, 1.0, 3.0, -1e-20, 1e10])
    seen = jax.device_get(histogram(jnp.asarray(x)))
    assert seen.counts.sum(1).tolist() == [5, 2]
    assert (seen.counts > 0).sum() == 6
    assert (seen.maximum, seen.minimum) == (np.float32(1e10), -1)
    kept = samples.sample_from_histogram(seen, True)
    found = {
        float(m * kept.unit[0]): int(n)
        for m, n in zip(np.asarray(kept.values[0]), np.asarray(kept.weights[0]), strict=True)
        if n
    }
    tiny = min(found)
    assert 0 < tiny < 1e-20  # among the zeros
    assert found == {tiny: 2, 1.0: 3, 3.0: 1, float(np.float32(1e10)): 1}
    unsigned = samples.sample_from_histogram(seen, False)
    assert int(unsigned.weights.sum()) == 5


def test_a_histogram_keeps_the_mean_of_each_bin():
    x = np.abs(source("student"))
    kept = samples.sample_from_histogram(jax.device_get(histogram(jnp.asarray(x))), True)
    counts, magnitudes = (np.asarray(a[0], np.float64) for a in (kept.weights, kept.values))
    magnitudes *= float(kept.unit[0])
    assert counts.sum() == SIZE
    assert np.sum(counts * magnitudes) == pytest.approx(np.sum(x.astype(np.float64)), rel=1e-6)
    assert np.sum(counts * magnitudes**2) == pytest.approx(
        np.sum(x.astype(np.float64) ** 2), rel=1e-6
    )


def test_a_million_equal_values_stay_what_they_are():
    x = np.full(1_000_003, 0.1, np.float32)
    kept = sample(x)
    assert float(kept.values[0].max() * kept.unit[0]) == pytest.approx(0.1, rel=1e-5)
    for value in (0.1, 0.3, 0.7, 1.7, 100.3):  # nothing is to be gained by a mu
        mu, (scale,), _ = fit_group([sample(value * x)], [FOUR])
        assert mu == 0
        assert float(scale[0]) == pytest.approx(0.1 * value, rel=1e-5)
    zeros = jax.jit(histogram)(jnp.zeros(2**24 + 3, jnp.bfloat16))  # more than float32 can count
    assert int(zeros.counts.sum()) == 2**24 + 3


def test_what_is_not_finite_is_not_counted():
    x = jnp.asarray([1.0, jnp.nan, jnp.inf, -jnp.inf, -2.0])
    seen = histogram(x)
    assert int(seen.counts.sum()) == 2
    assert np.all(np.isfinite(seen.sums))
    assert float(seen.unit) == 2
    assert np.isnan(seen.maximum)  # it shows there
    assert float(histogram(jnp.asarray([1.0, -jnp.inf])).minimum) == -np.inf


def test_histograms_add_up():
    x = source("bimodal")
    parts = [jax.device_get(histogram(jnp.asarray(part))) for part in np.split(x, [300, 7000])]
    merged = functools.reduce(merge_histograms, parts)
    whole = jax.device_get(histogram(jnp.asarray(x)))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-3, atol=1e-6)
    assert (merged.maximum, merged.minimum) == (whole.maximum, whole.minimum)


@pytest.mark.parametrize("sizes", [(1e-30, 1.0, 3e-4), (7.0, 1e-3, 1e20), (0.0, 1e-25, 0.0)])
def test_histograms_of_other_magnitudes_add_up(sizes):
    x = np.concatenate([np.float32(size) * source("bimodal", 500) for size in sizes])
    merged = functools.reduce(
        merge_histograms, [jax.device_get(histogram(jnp.asarray(p))) for p in np.split(x, 3)]
    )
    whole = jax.device_get(histogram(jnp.asarray(x)))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.sums, whole.sums, rtol=1e-3, atol=1e-6)
    extremes = [(h.maximum, h.minimum, h.unit) for h in (merged, whole)]
    assert extremes[0] == extremes[1]
