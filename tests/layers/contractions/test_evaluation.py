"""A program with other operands is the function with other operands, for any that there are.

They are cheap to compile here: a weight times a number for each of its channels, an activation's
sine. What a quantizer makes of them is tested in `test_quantized_function.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from small_models import QUICKLY, normal

from compand_jax.layers.contractions.program import trace


class Plainly:
    """Leaves operands as they are."""

    def w(self, site, x):
        return x

    a = w


class ByHand:
    """Replaces operands. `w` is given a weight as it is stored, or a stack's layer of it."""

    def __init__(self, layers):
        self._layers = layers

    def w(self, site, x):
        axes = self._layers[site].channel_axes
        shape = [n if i - x.ndim in axes else 1 for i, n in enumerate(x.shape)]
        size = np.prod(shape, dtype=int)
        return x * jnp.asarray(np.cos(np.arange(1, size + 1)).reshape(shape), x.dtype)

    def a(self, site, x):
        return jnp.sin(x) * jnp.asarray(0.6 + len(site) / 10, x.dtype)


def assert_replaced(function, params, *args):
    """Asserts outputs and gradients of the program and of the function; returns the layers."""

    def program(params, *args):
        return trace(functools.partial(function, Plainly()), params, args, {}, products=False)

    layers = program(params, *args).layers
    hand = ByHand(layers)

    def replaced(params, *args):
        return program(params, *args).run(
            lambda layer, w: hand.w(layer.site, w), lambda layer, x: hand.a(layer.site, x)
        )

    def both(call):
        def loss(params):
            outputs = call(params, *args)
            leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(outputs)]
            return sum(jnp.sum(jnp.sin(x)) for x in leaves), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)(params)

    (_, found), found_grads = both(replaced)
    (_, outputs), grads = both(functools.partial(function, hand))
    for pair in ((found, outputs), (found_grads, grads)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *pair)
    assert all(np.any(np.asarray(grad, np.float32)) for grad in jax.tree.leaves(grads))
    return layers


def primitives(program):
    """Returns the names of a program's primitives, of those in its bodies, too."""
    names = []
    for equation in program.eqns:
        names.append(equation.primitive.name)
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                names += primitives(inner)
    return names


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda x, dx: (doubled(*x), 3 * dx[0]))  # no derivative of it: a rule that is kept


@jax.custom_vjp
def halved(x):
    return x / 2


halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g * 5,))


@jax.custom_vjp
def fivefold(w):
    """Passes a weight on as it is, and its gradient five times."""
    return w


fivefold.defvjp(lambda w: (w, None), lambda _, g: (g * 5,))


def forms(q, params, x, i):
    """Every way from a parameter to a contraction."""
    own = {site: q.w(site, w) for site, w in params.items() if site not in ("table", "token")}
    found = {
        "matmul": q.a("matmul", x) @ own["matmul"],
        "transposed": q.a("transposed", x) @ jax.jit(jnp.transpose)(own["transposed"]),
        "ruled": q.a("ruled", x) @ fivefold(own["ruled"]),
        "token": q.a("after", jnp.broadcast_to(params["token"], (2, 4))) @ own["after"],
        "computed": params["token"] @ params["after"],
        "vector": q.a("vector", x) @ own["vector"],
        "merged": q.a("merged", x) @ own["merged"].reshape(4, 6),
        "split": jnp.einsum("bd,dhk->bhk", q.a("split", x), own["split"].reshape(4, 2, 3)),
        "cast": q.a("cast", x.astype(jnp.bfloat16)) @ own["cast"].astype(jnp.bfloat16),
        "indexed": jnp.einsum("bd,df->bf", q.a("indexed", x), own["indexed"][1])
        + q.a("indexed", x) @ own["indexed"][i],
        "cut": q.a("cut", x) @ own["cut"][:, 1:3],
        "parts": [q.a("parts", x) @ w for w in jnp.split(own["parts"], 2, 1)],
        "experts": jnp.einsum("bd,edf->ebf", q.a("experts", x), own["experts"]),
        "heads": jnp.einsum("bhd,hdf->bhf", q.a("heads", x.reshape(2, 2, 2)), own["heads"]),
        "kernel": lax.conv_general_dilated(
            q.a("kernel", x.reshape(1, 2, 2, 2)),
            own["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        "tied": (
            params["table"][jnp.array([1, 0])],
            q.a("table", x) @ q.w("table", params["table"]).T,
        ),
    }
    return found


FORMS = {
    "ruled": normal(4, 2), "token": normal(1, 4), "after": normal(4, 3, seed=6),
    "matmul": normal(4, 3), "transposed": normal(3, 4), "vector": normal(4),
    "merged": normal(4, 2, 3), "split": normal(4, 6), "cast": normal(4, 3, seed=1),
    "indexed": normal(3, 4, 2), "cut": normal(4, 4), "parts": normal(4, 6, seed=2),
    "experts": normal(2, 4, 3), "heads": normal(2, 2, 3), "kernel": normal(2, 2, 1, 2),
    "table": normal(2, 2, seed=3)[:, :1] * normal(2, 4, seed=4),
}  # fmt: skip


def test_every_form():
    layers = assert_replaced(forms, FORMS, normal(2, 4), jnp.int32(2))
    assert {site: layer.channel_axes for site, layer in layers.items()} == {
        "ruled": (-1,), "after": (-1,),
        "matmul": (-1,), "transposed": (-2,), "vector": (), "merged": (-2, -1), "split": (-1,),
        "cast": (-1,), "indexed": (-1,), "cut": (-1,), "parts": (-1,), "experts": (-3, -1),
        "heads": (-1,), "kernel": (-1,), "table": (-2,),
    }  # fmt: skip


def structures(q, params, x):
    """Every structure that a contraction can be in."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def block(x, w):
        return jnp.tanh(doubled(q.a("stack", x) @ q.w("stack", w)))

    def branch(sign, x):
        return sign * halved(q.a("own", x) @ q.w("own", params["own"]).T)

    def dense(x, w):
        return q.a("ruled", x) @ q.w("ruled", w)

    if isinstance(q, Plainly):  # a rule with a site inside is not kept
        dense = jax.custom_vjp(dense)
        dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: kept)

    def cell(h, x):
        h = jnp.tanh(x + q.a("cell", h) @ q.w("cell", params["cell"]))
        return h, h[0]

    x, _ = lax.scan(lambda x, w: (block(x, w), None), x, params["stack"])
    moved = q.w("moved", params["moved"]).swapaxes(0, 1)
    x, _ = lax.scan(lambda x, w: (jnp.sin(q.a("moved", x) @ w), None), x, moved, reverse=True)
    x = jax.jit(lambda x: lax.cond(x[0, 0] > 9, lambda x: x, functools.partial(branch, 2.0), x))(x)
    x = dense(x, params["ruled"])
    twice = jax.checkpoint(lambda x, w: jnp.tanh(q.a("twice", x) @ w))
    shared = q.w("twice", params["twice"]).T
    x = twice(twice(x, shared), shared)
    x = lax.fori_loop(0, 2, lambda i, x: x + q.a("loop", x) @ q.w("loop", params["loop"])[i], x)
    h, rows = lax.scan(cell, x, jnp.stack([x, -x]))
    return h, jax.vmap(lambda x: q.a("row", x) @ q.w("row", params["row"]))(rows)


STRUCTURES = {
    "stack": normal(3, 4, 4), "moved": normal(4, 2, 4), "own": normal(4, 4),
    "loop": normal(2, 4, 4), "ruled": normal(4, 4, seed=2),
    "twice": normal(4, 4, seed=3),
    "cell": normal(4, 4, seed=1), "row": normal(4, 3),
}  # fmt: skip


def test_every_structure():
    layers = assert_replaced(structures, STRUCTURES, normal(2, 4))
    assert set(layers) == set(STRUCTURES)


def test_structure_is_kept():
    x = normal(2, 4)

    def replaced(params, x):
        program = trace(functools.partial(structures, Plainly()), params, (x,), {}, products=False)
        return program.run(lambda layer, w: jnp.sin(w), lambda layer, x: jnp.cos(x))

    plain = jax.make_jaxpr(functools.partial(structures, Plainly()))(STRUCTURES, x)
    before, after = (
        primitives(plain.jaxpr),
        primitives(jax.make_jaxpr(replaced)(STRUCTURES, x).jaxpr),
    )
    for name in ("scan", "while", "cond", "remat2", "checkpoint", "dot_general", "custom_jvp_call"):
        assert before.count(name) == after.count(name), name
    # That of `halved`, in a branch of a site, is kept, and that with a site inside is not.
    assert (before.count("custom_vjp_call"), after.count("custom_vjp_call")) == (2, 1)
    # A stack's layer is replaced where it runs, and made again under remat: see `Quantized`.
    scan = next(
        e for e in jax.make_jaxpr(replaced)(STRUCTURES, x).eqns if e.primitive.name == "scan"
    )
    remat = next(n for n in primitives(scan.params["jaxpr"]) if n in ("remat2", "checkpoint"))
    assert primitives(scan.params["jaxpr"]).index(remat) < primitives(scan.params["jaxpr"]).index(
        "sin"
    )


def passed_on(q, params, x):
    """Bodies that return the parameters that they are given, as those of NNX do."""

    def body(w, x, name="w"):
        return w, jnp.tanh(q.a(name, x) @ q.w(name, w))

    def layer(x, w):
        w, x = body(w, x, "stack")
        return x, w

    w, x = jax.checkpoint(body)(params["w"], x)
    w, x = lax.cond(x[0, 0] > -9, body, lambda w, x: (w, x), w, x)
    (w, x), _ = lax.scan(lambda carry, _: (body(*carry), None), (w, x), length=2)
    x, stack = lax.scan(layer, x, params["stack"])
    x, stack = lax.scan(layer, x, stack, reverse=True)
    return body(w, x)[1], stack


def test_what_passes_a_parameter_on():
    params = {"w": normal(4, 4), "stack": normal(2, 4, 4, seed=1)}
    assert set(assert_replaced(passed_on, params, normal(3, 4))) == {"w", "stack"}

    def loop(q, w, x):
        def body(carry):
            w, x, i = carry
            return w, jnp.tanh(q.a("params", x) @ q.w("params", w)), i + 1

        w, x, _ = lax.while_loop(lambda carry: carry[2] < 2, body, (w, x, jnp.int32(0)))
        return q.a("params", x) @ q.w("params", w)

    w, x = params["w"], normal(3, 4)
    program = trace(functools.partial(loop, Plainly()), w, (x,), {}, products=False)
    hand = ByHand(program.layers)
    found = program.run(
        lambda layer, w: hand.w(layer.site, w), lambda layer, x: hand.a("params", x)
    )
    np.testing.assert_allclose(found, loop(hand, w, x), rtol=1e-5, atol=1e-6)
