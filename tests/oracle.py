"""The quantizers in float64 NumPy, written from the equations alone: what the tests compare with.

Nothing here knows the library. Codes come from the curve itself (compress, then round), not from
a table; gradients from the unsimplified formula, in extended precision, where it cancels.
"""

import numpy as np

CASES = tuple(
    [(bits, True, "midtread") for bits in range(2, 9)]
    + [(bits, False, "midtread") for bits in range(1, 9)]
    + [(bits, True, "midrise") for bits in range(1, 9)]
)
FEW = (
    (2, True, "midtread"),
    (8, True, "midtread"),
    (1, False, "midtread"),
    (4, False, "midtread"),
    (1, True, "midrise"),
    (8, True, "midrise"),
)
MUS = (0.0, 1e-6, 1e-3, 0.5, 5.0, 50.0, 255.0)
TINY_MU = 1e-9  # below it the formulas' limits are closer than the formulas


def spec(case):
    """Returns the keywords of a case."""
    return dict(zip(("bits", "signed", "grid"), case, strict=True))


def exact(value):
    """Returns the float64 of what float32 makes of `value`: what the library is given."""
    return np.asarray(np.asarray(value, np.float32), np.float64)


def _compress(v, mu):
    safe = np.where(mu == 0, 1, mu)
    return np.where(mu == 0, v, np.log1p(safe * v) / np.log1p(safe))


def _expand(y, mu):
    safe = np.where(mu == 0, 1, mu)
    return np.where(mu == 0, y, np.expm1(y * np.log1p(safe)) / safe)


def compress(x, mu):
    return np.sign(x) * _compress(np.abs(x), np.asarray(mu))


def expand(y, mu):
    return np.sign(y) * _expand(np.abs(y), np.asarray(mu))


def steps(bits, signed, grid):
    """Returns M of the midtread grid, H of the midrise grid."""
    if grid == "midrise":
        return 2 ** (bits - 1)
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


def code_range(bits, signed, grid):
    """Returns all codes, ascending."""
    n = steps(bits, signed, grid)
    if grid == "midrise":
        return np.arange(-n, n)
    return np.arange(-n if signed else 0, n + 1)


def _y_of_code(codes, bits, signed, grid):
    n = steps(bits, signed, grid)
    return (codes + 0.5) / n if grid == "midrise" else codes / n


def dequantize(codes, mu, scale, bits, signed, grid):
    return scale * expand(_y_of_code(np.asarray(codes, np.float64), bits, signed, grid), mu)


def codebook(mu, scale, bits, signed, grid):
    """Returns all levels and the thresholds between them, for scalar `mu` and `scale`."""
    codes = code_range(bits, signed, grid)
    n = steps(bits, signed, grid)
    between = codes[1:] / n if grid == "midrise" else (codes[1:] - 0.5) / n
    return dequantize(codes, mu, scale, bits, signed, grid), scale * expand(between, mu)


def quantize(x, mu, scale, bits, signed, grid):
    """Returns the codes of `x`; at a tie, midtread goes inwards and midrise outwards."""
    x = np.asarray(x, np.float64)
    n = steps(bits, signed, grid)
    y = _compress(np.minimum(np.abs(x) / scale, 1), mu)
    if grid == "midrise":
        k = np.minimum(np.floor(n * y), n - 1)
        return np.where(x < 0, -k - 1, k).astype(np.int64)
    k = np.ceil(n * y - 0.5)
    return np.where(x < 0, -k if signed else 0, k).astype(np.int64)


def fake_quantize(x, mu, scale, bits, signed, grid):
    codes = quantize(x, mu, scale, bits, signed, grid)
    return dequantize(codes, mu, scale, bits, signed, grid)


def near_threshold(x, mu, scale, bits, signed, grid, tolerance=4e-6):
    """Returns where `x` lies within a relative `tolerance` of a threshold, for scalar `mu`."""
    thresholds = codebook(mu, scale, bits, signed, grid)[1]
    place = np.searchsorted(thresholds, x)
    near = np.zeros(x.shape, bool)
    for beside in (place - 1, place):
        threshold = thresholds[np.clip(beside, 0, len(thresholds) - 1)]
        near |= np.abs(x - threshold) <= tolerance * np.abs(threshold)
    return near


def gradients(x, mu, scale, bits, signed, grid, gradient="identity"):
    """Returns dQ/dx, dQ/dmu, dQ/dscale of every element: straight-through, unsimplified."""
    x = np.asarray(x, np.longdouble)
    mu = np.asarray(mu, np.longdouble)
    codes = quantize(x, mu, scale, bits, signed, grid)
    yq = np.abs(_y_of_code(codes.astype(np.longdouble), bits, signed, grid))
    vq = _expand(yq, mu)
    inside = np.abs(x) < scale
    v = np.where(inside, np.abs(x) / scale, 1)
    y = _compress(v, mu)
    sign = np.where(x < 0, -1, 1)
    live = np.ones(x.shape, bool) if signed else x > 0

    safe = np.where(mu < TINY_MU, 1, mu)
    slope = ((1 + mu * vq) * (yq - y) / (1 + mu) + (vq - v) / -(1 + mu * v)) / safe
    slope = np.where(mu < TINY_MU, (vq - v) * (vq + v - 1) / 2, slope)
    dx = (1 + mu * vq) / (1 + mu * v) if gradient == "chain" else np.ones(x.shape)
    dx = np.where(inside & live, dx, 0)
    dmu = np.where(live, sign * scale * slope, 0)
    dscale = np.where(live, sign * np.where(inside, vq - v, vq), 0)
    return tuple(np.asarray(g, np.float64) for g in (dx, dmu, dscale))


def samples(n, scale, seed=0, specials=True):
    """Returns `n` float32 values that reach every level: some beyond the clip, some tiny."""
    rng = np.random.default_rng(seed)
    quarter = n // 4
    parts = [
        rng.normal(0, 0.5, n - 3 * quarter),
        rng.laplace(0, 0.3, quarter),
        rng.uniform(-1.3, 1.3, quarter),
        10 ** rng.uniform(-6, 0.3, quarter) * rng.choice([-1.0, 1.0], quarter),
    ]
    x = np.float32(scale) * np.concatenate(parts).astype(np.float32)
    rng.shuffle(x)
    if specials:
        edge = np.float32(scale)
        near = [np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))]
        special = [0.0, edge, *near, 3 * edge, 3e38, 1e-30, np.inf]
        special = np.float32(special)
        x[: 2 * len(special)] = np.concatenate([special, -special])
    return x
