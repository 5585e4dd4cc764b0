"""The networks, as plain Linen modules, by name."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from compand_jax.models.alexnet import AlexNet as AlexNet
from compand_jax.models.cnn import CNN as CNN
from compand_jax.models.layers import BLOCK_ORDERS as BLOCK_ORDERS
from compand_jax.models.layers import check_choice
from compand_jax.models.resnet import ResNet as ResNet
from compand_jax.models.vgg import VGG as VGG
from compand_jax.models.vgg import VGGSmall as VGGSmall

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "cnn": CNN,
        "alexnet": AlexNet,
        "alexnet-bn": functools.partial(AlexNet, norm="batch"),
        **{f"vgg{depth}": functools.partial(VGG, depth=depth) for depth in (11, 13, 16, 19)},
        "vgg-small": VGGSmall,
        **{f"resnet{depth}": functools.partial(ResNet, depth=depth) for depth in (20, 32, 44, 56)},
    }
)

FIRST_AND_LAST = ("conv1", "dense")
"""The first and the last layer of each of them, which low-bit literature often gives more bits."""


def create_model(
    name: str,
    num_classes: int,
    block_order: str = "conv_norm_act",
    dtype: DTypeLike = jnp.float32,
) -> nn.Module:
    """Returns the network of that name, not yet initialized.

    Args:
      name: a key of `MODELS`.
      num_classes: number of logits.
      block_order: "conv_norm_act" or "norm_act_conv"; see `compand_jax.models.layers`.
      dtype: of the computation; parameters and logits are float32.

    Returns:
      A module to call on normalized images [batch, h, w, c], with `train=True` to use and update
      batch statistics (collection "batch_stats").

    Raises:
      ValueError: for a name or block order that is not known.

    >>> create_model("resnet20", num_classes=10).depth
    20
    """
    check_choice("name", name, tuple(MODELS))
    check_choice("block_order", block_order, BLOCK_ORDERS)
    return MODELS[name](num_classes=num_classes, block_order=block_order, dtype=dtype)
