"""PyTorch's networks in NumPy, and the state dicts that they have."""

import jax.numpy as jnp
import numpy as np

ALEXNET = [(64, 11, 4, 5), "M", (192, 5, 1, 2), "M"]
ALEXNET += [(384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), "M"]
VGGS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


def vgg(depth):
    return ["M" if word == "M" else (int(word), 3, 1, 1) for word in VGGS[depth].split()]


class Weights:
    """Makes a state dict of random arrays, as the network that is run asks for them."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.state_dict = {}

    def normal(self, name, shape, scale=1.0, offset=0.0):
        value = offset + scale * self.rng.normal(size=shape)
        return self.state_dict.setdefault(name, value.astype(np.float32)).astype(np.float64)

    def conv(self, name, x, spec, *, bias):
        out, kernel, stride, padding = spec
        shape = (out, x.shape[1], kernel, kernel)
        w = self.normal(f"{name}.weight", shape, np.sqrt(2 / np.prod(shape[1:])))
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))
        y = np.tensordot(windows[:, :, ::stride, ::stride], w, ((1, 4, 5), (1, 2, 3)))
        y = y.transpose(0, 3, 1, 2)
        return y + channels(self.normal(f"{name}.bias", (out,), 0.5)) if bias else y

    def norm(self, name, x):
        shape = (x.shape[1],)
        weight, bias = self.normal(f"{name}.weight", shape), self.normal(f"{name}.bias", shape)
        mean = self.normal(f"{name}.running_mean", shape, 0.3)
        var = np.abs(self.normal(f"{name}.running_var", shape, 0.1, 1.0))
        self.state_dict[f"{name}.num_batches_tracked"] = np.int64(7)
        normalized = (x - channels(mean)) / np.sqrt(channels(var) + 1e-5)
        return normalized * channels(weight) + channels(bias)

    def linear(self, name, x, out):
        w = self.normal(f"{name}.weight", (out, x.shape[1]), 1 / np.sqrt(x.shape[1]))
        return x @ w.T + self.normal(f"{name}.bias", (out,))


def channels(values):
    return values[:, None, None]


def relu(x):
    return np.maximum(x, 0)


def max_pool(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))


def stack(weights, x, layers, *, norm):
    """AlexNet or VGG: an nn.Sequential named features, whose members are numbered."""
    n = 0
    for layer in layers:
        if layer == "M":
            x, n = max_pool(x), n + 1
            continue
        x, n = weights.conv(f"features.{n}", x, layer, bias=True), n + 1
        if norm:
            x, n = weights.norm(f"features.{n}", x), n + 1
        x, n = relu(x), n + 1
    # One pixel: whether channels come first or last when flattened is no question.
    assert x.shape[2:] == (1, 1)
    return weights.linear("classifier", x[:, :, 0, 0], 10)


def resnet(weights, x, depth):
    x = relu(weights.norm("bn1", weights.conv("conv1", x, (16, 3, 1, 1), bias=False)))
    for stage, planes in ((1, 16), (2, 32), (3, 64)):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = weights.conv(f"{name}.conv1", x, (planes, 3, stride, 1), bias=False)
            y = relu(weights.norm(f"{name}.bn1", y))
            y = weights.conv(f"{name}.conv2", y, (planes, 3, 1, 1), bias=False)
            y = weights.norm(f"{name}.bn2", y)
            if stride == 2:
                quarter = (planes // 4, planes // 4)
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), quarter, (0, 0), (0, 0)))
            x = relu(y + x)
    return weights.linear("linear", x.mean(axis=(2, 3)), 10)


NETWORKS = {
    "alexnet": lambda weights, x: stack(weights, x, ALEXNET, norm=False),
    "alexnet-bn": lambda weights, x: stack(weights, x, ALEXNET, norm=True),
    **{
        f"vgg{depth}": lambda weights, x, depth=depth: stack(weights, x, vgg(depth), norm=True)
        for depth in VGGS
    },
    **{
        f"resnet{depth}": lambda weights, x, depth=depth: resnet(weights, x, depth)
        for depth in (20, 32, 44, 56)
    },
}


def made(network, batch=0):
    """Returns a state dict, images [n, h, w, c], and the logits that NumPy gives."""
    weights, x = Weights(), np.random.default_rng(1).normal(size=(batch, 3, 32, 32))
    x[1:] = 3 * x[1:] + 1  # also on average another image than the first
    logits = NETWORKS[network](weights, x)
    return weights.state_dict, jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32), logits
