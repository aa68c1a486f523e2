"""What the vision towers have in common. On the MLX thread."""

from __future__ import annotations

import mlx.core as mx
import numpy

from _mlx_server.inference.images.image_layout import ImageLayout

_FUSED = 64, 80, 128  # sizes of heads for which Metal has a kernel that keeps no table of scores


def colours(pixels: numpy.ndarray, layout: ImageLayout) -> mx.array:
    """Pixels, (height, width, 3) bytes, as a model wants their colours."""
    x = mx.array(pixels).astype(mx.float32) / 255
    return (x - mx.array(layout.mean)) / mx.array(layout.std)


def with_flat_kernel(weights: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    """The weights of a checkpoint as they are here: a patch is a flat list of numbers, channel by
    channel, and so is what the convolution `name` has for it. MLX's own checkpoints have the
    channels last."""
    kernel = weights[name]
    if kernel.shape[-1] != kernel.shape[-2]:
        kernel = kernel.moveaxis(-1, 1)
    return {**weights, name: kernel.flatten(1)}


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float | None = None
) -> mx.array:
    """Attention of all patches to all: (heads, patches, size of a head). `scale` is that of the
    scores, if it is not the usual one."""
    head = queries.shape[-1]
    more = next((fused for fused in _FUSED if fused >= head), head) - head
    parts = (queries, keys, values)
    padded = (mx.pad(part[None], [(0, 0)] * 3 + [(0, more)]) for part in parts)  # changes no score
    return mx.fast.scaled_dot_product_attention(*padded, scale=scale or head**-0.5)[0, ..., :head]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotates the first numbers of each vector, two for one of `cos` and `sin`, whose axes are x's
    last two."""
    half = cos.shape[-1]
    first, second = x[..., :half].astype(mx.float32), x[..., half : 2 * half].astype(mx.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)
