"""Whole models of a dozen kinds, tiny, in plain Linen, as their authors would have written them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from small_models import KEY, drawn, normal

WORDS, LENGTH = 11, 8
WIDTH = 8


class Feedforward(nn.Module):
    """Two layers, the second of which gives what is added to the input."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(WIDTH, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class LanguageModel(nn.Module):
    """Predicts the next word; the embedding is the output layer as well."""

    @nn.compact
    def __call__(self, ids, train=False):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = embed(ids) + self.param("positions", nn.initializers.normal(0.1), (1, LENGTH, WIDTH))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        x = x + Feedforward()(nn.LayerNorm()(x))
        return embed.attend(nn.LayerNorm()(x))


class UNet(nn.Module):
    """Segments an image: down, up, and what was on the way down beside what is on the way up."""

    @nn.compact
    def __call__(self, x, train=False):
        def block(x, name):
            x = nn.Conv(WIDTH, (3, 3), use_bias=False, name=f"{name}_conv")(x)
            return nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x))

        top = block(x, "top")
        bottom = block(nn.avg_pool(top, (2, 2), (2, 2)), "bottom")
        y = nn.ConvTranspose(WIDTH, (2, 2), (2, 2), name="up")(bottom)
        y = block(jnp.concatenate([y, top], -1), "back")
        return nn.Conv(3, (1, 1), name="classes")(y)


class Tagger(nn.Module):
    """An LSTM over words."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, WIDTH)(ids)
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(WIDTH))(x))


class Mixer(nn.Module):
    """Mixes patches, then channels, in turn."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 2), strides=(4, 2), name="stem")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(Feedforward(name=f"tokens{i}")(y), 1, 2)
            x = x + Feedforward(name=f"channels{i}")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


class Depthwise(nn.Module):
    """Inverted residuals: one by one, depthwise, one by one."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(not train, momentum=0.9)  # noqa: E731
        x = nn.relu6(norm()(nn.Conv(WIDTH, (3, 3), (2, 2), use_bias=False)(x)))
        for strides in (1, 2):
            y = nn.relu6(norm()(nn.Conv(WIDTH, (1, 1), use_bias=False)(x)))
            y = nn.Conv(WIDTH, (3, 3), strides, feature_group_count=WIDTH, use_bias=False)(y)
            y = norm()(nn.Conv(WIDTH, (1, 1), use_bias=False)(nn.relu6(norm()(y))))
            x = x + y if strides == 1 else y
        return nn.Dense(3)(x.mean((1, 2)))


class VisionTransformer(nn.Module):
    """Patches and a token for the class, in bfloat16; parameters stay float32."""

    @nn.compact
    def __call__(self, x):
        dtype = jnp.bfloat16
        x = nn.Conv(WIDTH, (4, 4), (4, 4), dtype=dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = self.param("token", nn.initializers.normal(0.1), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token.astype(dtype), (len(x), 1, WIDTH)), x], 1)
        position = self.param("position", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        x = x + position.astype(dtype)
        for _ in range(2):
            attention = nn.MultiHeadDotProductAttention(2, dtype=dtype)
            x = x + attention(nn.LayerNorm(dtype=dtype)(x))
            x = x + Feedforward(dtype)(nn.LayerNorm(dtype=dtype)(x))
        return nn.Dense(3, dtype=dtype, name="head")(nn.LayerNorm(dtype=dtype)(x[:, 0]))


class Denoiser(nn.Module):
    """Predicts the noise in an image, given how much there is and what it shows."""

    @nn.compact
    def __call__(self, inputs):
        rates = 2.0 ** jnp.arange(WIDTH // 2, dtype=jnp.float32)
        angles = inputs["time"][:, None] * rates[None]
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        given = nn.Dense(WIDTH, name="time")(time) + nn.Embed(3, WIDTH, name="label")(
            inputs["label"]
        )
        x = nn.Conv(WIDTH, (3, 3), name="stem")(inputs["image"])
        for i in range(2):
            film = nn.Dense(WIDTH, name=f"film{i}")(nn.silu(given))[:, None, None]
            y = nn.GroupNorm(2)(x) * (1 + film)
            x = x + nn.Conv(WIDTH, (3, 3), name=f"conv{i}")(nn.silu(y))
        return {"noise": nn.Conv(inputs["image"].shape[-1], (3, 3), name="noise")(x)}


class Normal:
    """A distribution, as libraries of distributions have it: a plain object, unknown to jax."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale

    def mode(self):
        return self.loc

    def log_prob(self, x):
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - jnp.log(self.scale)


class ActorCritic(nn.Module):
    """A policy, as a distribution of actions, and the value of an observation."""

    @nn.compact
    def __call__(self, observation):
        x = nn.tanh(nn.Dense(WIDTH, name="shared")(observation))
        loc = nn.Dense(2, name="actor")(nn.tanh(nn.Dense(WIDTH, name="policy")(x)))
        log_scale = self.param("log_scale", nn.initializers.zeros, (2,))
        value = nn.Dense(1, name="critic")(x)
        return Normal(loc, jnp.broadcast_to(jnp.exp(log_scale), loc.shape)), value[..., 0]


class Refinement(nn.Module):
    """One step of a network that is run again and again."""

    @nn.compact
    def __call__(self, state, _):
        y = Feedforward(name="inside")(nn.LayerNorm()(state))
        return state + y, jnp.mean(y**2)


class Recurrent(nn.Module):
    """The same block four times, by a scan that broadcasts its parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="first")(x)
        same = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        x, sizes = nn.scan(Refinement, length=4, **same)(name="block")(x, None)
        return nn.Dense(3, name="last")(x), sizes


class LowRankDense(nn.Module):
    """A dense layer and a change of low rank, which starts at zero."""

    features: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        down = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], self.rank))
        up = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return nn.Dense(self.features, name="base")(x) + 2 * (x @ down) @ up


class LowRankOfLayers(nn.Module):
    """The same, of layers."""

    features: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        down = nn.Dense(self.rank, use_bias=False, name="lora_a")(x)
        zeros = nn.initializers.zeros
        up = nn.Dense(self.features, use_bias=False, kernel_init=zeros, name="lora_b")(down)
        return nn.Dense(self.features, name="base")(x) + 2 * up


class LowRank(nn.Module):
    """A network that is adapted by changes of low rank."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(LowRankDense(WIDTH, name="first")(x))
        x = nn.relu(LowRankOfLayers(WIDTH, name="second")(x))
        return nn.Dense(3, name="head")(x)


class Expert(nn.Module):
    """One of several networks of the same shape."""

    @nn.compact
    def __call__(self, x):
        return Feedforward(name="inside")(x)


class Experts(nn.Module):
    """One expert of three for a batch, by its domain."""

    @nn.compact
    def __call__(self, x, domain):
        x = nn.Dense(WIDTH, name="first")(x)
        experts = [Expert(name=f"expert{i}") for i in range(3)]
        if self.is_initializing():
            for expert in experts:
                expert(x)
        branches = [lambda _, x, expert=expert: expert(x) for expert in experts]
        x = x + nn.switch(domain, branches, self, x)
        return nn.Dense(3, name="last")(x)


class Decoder(nn.Module):
    """A language model that writes word by word, with a cache of keys and values."""

    decode: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, WIDTH, name="embed")(ids)
        x = x + self._position(ids.shape[1])
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(2, decode=self.decode, name=f"attention{i}")
            mask = None if self.decode else nn.make_causal_mask(ids)
            x = x + attention(nn.LayerNorm(name=f"before{i}")(x), mask=mask)
            x = x + Feedforward(name=f"mlp{i}")(nn.LayerNorm(name=f"between{i}")(x))
        return nn.Dense(WORDS, name="words")(nn.LayerNorm(name="after")(x))

    def _position(self, length):
        table = self.param("positions", nn.initializers.normal(0.5), (LENGTH, WIDTH))
        if not self.decode:
            return table[None, :length]
        started = self.has_variable("cache", "position")
        at = self.variable("cache", "position", lambda: jnp.zeros((), jnp.int32))
        if not started:
            return table[None, :length]
        at.value += 1
        return jax.lax.dynamic_slice_in_dim(table, at.value - 1, 1)[None]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model and what it is given.

    Attributes:
      model: The Linen module.
      batches: Each the model's positional arguments.
      train: Further arguments of `apply` in training.
      arrays: Returns the arrays of what the model returns.
      rounding: By how much of the largest output XLA may round in another way, compiling twice.
    """

    model: nn.Module
    batches: list[tuple]
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Callable = jax.tree.leaves
    rounding: float = 1e-6


def words(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, WORDS, shape), jnp.int32)


def images(seed):
    """Returns images that are not normal: smooth, positive, with a corner that is bright."""
    x = normal(4, 8, 8, 3, seed=seed)
    return jnp.abs(x + jnp.roll(x, 1, 1) + jnp.roll(x, 1, 2)).at[:, :4, :4].multiply(2)


def noisy(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": normal(4, 8, 8, 3, seed=seed),
        "time": jnp.asarray(rng.uniform(size=4), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, 4), jnp.int32),
    }


def policy_arrays(output):
    distribution, value = output
    return [distribution.mode(), distribution.log_prob(distribution.mode() + 0.5), value]


def _batches(make):
    return [(make(seed),) for seed in range(2)]


TRAIN, DROPOUT = {"train": True}, {"rngs": {"dropout": jax.random.key(1)}}

WHOLES = {
    "language model": lambda: Whole(
        LanguageModel(), _batches(lambda seed: words(seed, 4, LENGTH)), TRAIN | DROPOUT
    ),
    "U-Net": lambda: Whole(UNet(), _batches(images), TRAIN),
    "LSTM": lambda: Whole(Tagger(), _batches(lambda seed: words(seed, 4, LENGTH))),
    "mixer": lambda: Whole(Mixer(), _batches(images)),
    "depthwise": lambda: Whole(Depthwise(), _batches(images), TRAIN),
    "vision transformer": lambda: Whole(VisionTransformer(), _batches(images), rounding=0.01),
    "denoiser": lambda: Whole(Denoiser(), _batches(noisy)),
    "actor-critic": lambda: Whole(
        ActorCritic(), _batches(lambda seed: normal(16, 5, seed=seed)), arrays=policy_arrays
    ),
    "scanned": lambda: Whole(Recurrent(), _batches(lambda seed: normal(16, 5, seed=seed))),
    "low rank": lambda: Whole(LowRank(), _batches(lambda seed: normal(16, 5, seed=seed))),
    "experts": lambda: Whole(
        Experts(), [(normal(16, 5, seed=i), jnp.asarray(i, jnp.int32)) for i in range(3)]
    ),
    "decoder": lambda: Whole(Decoder(), _batches(lambda seed: words(seed, 2, LENGTH))),
}


@functools.lru_cache
def initialized(name):
    """Returns a whole model, and its variables of full precision."""
    found = WHOLES[name]()
    # A change of low rank starts at zero. All else may be any numbers, which spares compiling init.
    own = name == "low rank"
    start = (
        functools.partial(found.model.init, KEY) if own else functools.partial(drawn, found.model)
    )
    return found, start(*found.batches[0])


def evaluated(model, found, **options):
    """Returns a jitted function of variables and arguments: the arrays that the model returns."""
    return jax.jit(lambda variables, *args: found.arrays(model.apply(variables, *args)), **options)


def assert_close(found, expected, tolerance):
    """Every array equal to within `tolerance` of its largest magnitude."""
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == z.dtype
        y, z = np.asarray(y, np.float64), np.asarray(z, np.float64)
        np.testing.assert_allclose(y, z, rtol=0, atol=tolerance * np.abs(z).max())
