"""Images cropped and mirrored at random, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped


def augment(
    key: PRNGKeyArray | Shaped[Array, "..."],
    images: Shaped[Array | np.ndarray, "..."],
    *,
    pad: int,
    flip: bool,
) -> Shaped[Array, "..."]:
    """Returns the images, each cropped at random from its zero-padded self and flipped or not.

    Args:
      key: a PRNG key; the same key gives the same result.
      images: uint8 [n, h, w, c].
      pad: zeros added on each side, in pixels; a crop's shift is uniform in [-pad, pad].
      flip: whether to mirror left to right with probability 1/2, each image on its own.

    Returns:
      Images of the same shape and type; the very images for `pad=0, flip=False`.

    Raises:
      ValueError: if the images are not [n, h, w, c], or `pad` is negative.

    >>> images = jnp.ones((2, 4, 4, 3), jnp.uint8)
    >>> bool((augment(jax.random.key(0), images, pad=0, flip=True) == images).all())
    True
    """
    if images.ndim != 4:
        raise ValueError(
            f"`images` must be [n, h, w, c], got {list(images.shape)}: add or remove dimensions"
        )
    if pad < 0:
        raise ValueError(f"`pad` must be at least 0 pixels, got {pad}: 0 turns it off")
    crop_key, flip_key = jax.random.split(key)
    n = images.shape[0]
    offsets = jax.random.randint(crop_key, (n, 2), 0, 2 * pad + 1)
    flips = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (n,))
    return crop_and_flip(jnp.asarray(images), offsets, flips, pad=pad)


def crop_and_flip(
    images: Shaped[Array, "n h w c"],
    offsets: Int[Array, "n 2"],
    flips: Bool[Array, " n"],
    *,
    pad: int,
) -> Shaped[Array, "n h w c"]:
    """Returns each image cropped from its zero-padded self at its offset, then mirrored or not.

    Args:
      images: [n, h, w, c], of any type.
      offsets: row and column of the crop in the padded image, in [0, 2 pad]; (pad, pad) is the
        image itself.
      flips: whether to mirror left to right.
      pad: zeros added on each side, in pixels.

    Returns:
      Images of the same shape and type.
    """
    n, h, w, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    x = jnp.arange(w, dtype=offsets.dtype)[None, :]
    rows = offsets[:, :1] + jnp.arange(h, dtype=offsets.dtype)[None, :]
    columns = offsets[:, 1:] + jnp.where(flips[:, None], w - 1 - x, x)
    return padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
