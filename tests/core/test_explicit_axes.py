"""The quantizers on meshes with explicit axes: values, shardings, and no trace of it without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import normal

import compand_jax as cj
from compand_jax.calibration.samples import histogram

X = normal(16, 6)
MU, SCALE = 3.0, 1.5
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
# Few thresholds, which are compared with each, and many, which are looked up.
CASES = [(3, True, "midtread"), (8, False, "midtread"), (6, True, "midrise")]


def on_mesh(x, spec, kinds=(EXPLICIT, EXPLICIT)):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    return mesh, jax.device_put(x, NamedSharding(mesh, spec))


def sharding_of(x):
    return jax.typeof(x).sharding.spec


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_levels_are_the_oracles_and_sharded_as_the_values(case, is_set):
    mesh, x = on_mesh(X, P("data", "model"))
    spec = oracle.spec(case)
    numbers = oracle.exact(MU), oracle.exact(SCALE), *case
    wanted = oracle.quantize(oracle.exact(X), *numbers)
    levels = oracle.dequantize(wanted, *numbers)
    with jax.set_mesh(mesh if is_set else jax.sharding.Mesh(np.empty((), object), ())):
        codes = cj.quantize(x, MU, SCALE, **spec)
        found = cj.dequantize(codes, MU, SCALE, **spec), cj.fake_quantize(x, MU, SCALE, **spec)
    np.testing.assert_array_equal(codes, wanted)
    for values in found:
        np.testing.assert_allclose(values, levels, rtol=1e-5, atol=1e-6)
        assert sharding_of(values) == P("data", "model")
    assert sharding_of(codes) == P("data", "model")


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ((EXPLICIT, EXPLICIT), P("data", "model")),
        ((EXPLICIT, AUTO), P("data", None)),
        ((AUTO, EXPLICIT), P(None, "model")),
    ],
)
def test_gradients_are_those_of_one_device_and_sharded_as_the_operands(kinds, wanted):
    scale, weights = jnp.linspace(0.5, 2.0, 6).reshape(1, 6), normal(16, 6, seed=1)

    def loss(x, mu, scale):
        return jnp.sum(weights * cj.fake_quantize(x, mu, scale, bits=7))

    gradient = jax.grad(loss, (0, 1, 2))
    one_device = gradient(X, jnp.asarray(MU), scale)
    mesh, x = on_mesh(X, P("data", "model"), kinds)
    spread = jax.device_put(scale, NamedSharding(mesh, P(None, "model")))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(x, jnp.asarray(MU), spread)
    for leaf, right in zip(found, one_device, strict=True):
        np.testing.assert_allclose(leaf, right, rtol=1e-5, atol=1e-5)
    assert sharding_of(found[0]) == wanted
    assert sharding_of(found[2]) == P(None, wanted[1])


def test_vmap_over_a_sharded_axis():
    mesh, x = on_mesh(X, P("data"))
    quantize = functools.partial(cj.quantize, mu=MU, scale=SCALE, bits=8)
    with jax.set_mesh(mesh):
        codes = jax.vmap(quantize)(x)
    np.testing.assert_array_equal(codes, quantize(X))
    assert sharding_of(codes) == P("data", None)


def test_the_part_of_a_mesh_that_shard_map_leaves_explicit():
    mesh, x = on_mesh(X, P("data", "model"))
    quantize = functools.partial(cj.quantize, mu=MU, scale=SCALE, bits=8)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            quantize, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
        )
        codes = jax.jit(mapped)(x)
    np.testing.assert_array_equal(codes, quantize(X))
    assert sharding_of(codes) == P("data", "model")


def test_a_histogram_is_the_same_and_replicated():
    mesh, x = on_mesh(X, P("data", "model"))
    with jax.set_mesh(mesh):
        found = jax.jit(histogram)(x)
    for leaf, right in zip(found, jax.jit(histogram)(X), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=1e-6)
        assert not any(sharding_of(leaf))


def primitives(program):
    for equation in program.eqns:
        yield equation.primitive.name
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(part):
                yield from primitives(getattr(part, "jaxpr", part))


def is_program(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO, None])
def test_without_explicit_axes_nothing_is_added_to_a_program(kind):
    x = X
    if kind is not None:
        _, x = on_mesh(X, P("data"), (kind, kind))
    quantize = functools.partial(cj.fake_quantize, scale=SCALE, bits=8)
    names = set(primitives(jax.make_jaxpr(quantize)(x, jnp.asarray(MU)).jaxpr))
    assert ("reshard" in names) == (kind is EXPLICIT)
