"""The vision tower of Pixtral, which Mistral Small from 3.1 on and Devstral have too:
https://arxiv.org/abs/2410.07073

Its patches are in rows, as they are read. On the MLX thread."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy

from _mlx_server.inference.images.image_layout import MistralLayout
from _mlx_server.inference.images.tower_parts import attend, colours, rotate, with_flat_kernel

_ACTIVATIONS = {"silu": nn.silu, "gelu": nn.gelu, "gelu_pytorch_tanh": nn.gelu_approx}


class PixtralTower(nn.Module):
    """From an image's pixels to what the language model reads in place of its tokens. `config` is
    the model's."""

    def __init__(self, config: dict[str, Any], layout: MistralLayout):
        super().__init__()
        tower = config["vision_config"]
        size, channels = tower["hidden_size"], tower.get("num_channels", 3)
        self.patch_conv = nn.Linear(channels * layout.patch**2, size, bias=False)
        self.ln_pre = nn.RMSNorm(size, eps=1e-5)
        self.transformer = _Transformer(tower)
        self.multi_modal_projector = _Projector(config, layout.merge)
        self._layout, self._head = layout, size // tower["num_attention_heads"]
        rope = tower.get("rope_parameters") or tower
        self._theta = float(rope.get("rope_theta", 10000.0))

    def __call__(self, pixels: numpy.ndarray) -> tuple[mx.array, list[mx.array]]:
        """What is read in place of an image's tokens, (tokens, hidden size), and nothing that is
        added behind layers. `pixels` are (height, width, 3) bytes."""
        height, width = (side // self._layout.patch for side in pixels.shape[:2])
        x = self.ln_pre(self.patch_conv(self._patches(pixels, height, width)))
        rotation = self._rotation(height, width)
        for layer in self.transformer.layers:
            x = layer(x, mx.cos(rotation), mx.sin(rotation))
        return self.multi_modal_projector(x, height, width), []

    @property
    def patch_nbytes(self) -> int:
        """About how many bytes a patch takes while it is read."""
        return 4 * (8 * self.ln_pre.weight.size + 3 * self.transformer.inner)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights of a checkpoint as they are here."""
        return with_flat_kernel(weights, "patch_conv.weight")

    def _patches(self, pixels: numpy.ndarray, height: int, width: int) -> mx.array:
        """(patches, numbers of a patch)"""
        patch, channels = self._layout.patch, pixels.shape[-1]
        x = colours(pixels, self._layout)
        x = x.reshape(height, patch, width, patch, channels).transpose(0, 2, 4, 1, 3)
        return x.reshape(height * width, -1).astype(self.patch_conv.weight.dtype)

    def _rotation(self, height: int, width: int) -> mx.array:
        """The angles by which patches are rotated, (patches, half the size of a head): half of the
        frequencies are for the row, the others for the column."""
        places = numpy.arange(0, self._head, 2, dtype=numpy.float32) / self._head
        frequencies = self._theta**-places
        rows, columns = numpy.indices((height, width)).reshape(2, -1, 1)
        angles = [rows * frequencies[0::2], columns * frequencies[1::2]]
        return mx.array(numpy.concatenate(angles, axis=-1, dtype=numpy.float32))


class _Transformer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.inner: int = config["intermediate_size"]
        self.layers = [_Layer(config) for _ in range(config["num_hidden_layers"])]


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        size = config["hidden_size"]
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(size, eps=1e-5) for _ in range(2))
        self.attention = _Attention(size, config["num_attention_heads"])
        self.feed_forward = _MLP(size, config["intermediate_size"], config.get("hidden_act"))

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(2))
        self._heads = heads

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        patches, size = x.shape
        queries, keys, values = (
            projection(x).reshape(patches, self._heads, -1).transpose(1, 0, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = attend(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        return self.o_proj(x.transpose(1, 0, 2).reshape(patches, size))


class _MLP(nn.Module):
    def __init__(self, size: int, inner: int, activation: str | None):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, size, bias=False)
        self._activation = _ACTIVATIONS[activation or "gelu"]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


class _Projector(nn.Module):
    """From the tower's space to the language model's; all but the first models of the family merge
    patches there."""

    def __init__(self, config: dict[str, Any], merge: int):
        super().__init__()
        size, text = config["vision_config"]["hidden_size"], config["text_config"]
        self._merges = config["model_type"] == "mistral3"
        bias = bool(config.get("multimodal_projector_bias", not self._merges))
        if self._merges:
            self.norm = nn.RMSNorm(size, eps=text.get("rms_norm_eps", 1e-5))
            self.patch_merger = _Merger(size, merge)
        self.linear_1 = nn.Linear(size, text["hidden_size"], bias=bias)
        self.linear_2 = nn.Linear(text["hidden_size"], text["hidden_size"], bias=bias)
        self._activation = _ACTIVATIONS[config.get("projector_hidden_act") or "gelu"]

    def __call__(self, x: mx.array, height: int, width: int) -> mx.array:
        if self._merges:
            x = self.patch_merger(self.norm(x), height, width)
        return self.linear_2(self._activation(self.linear_1(x)))


class _Merger(nn.Module):
    """Makes one vector of the patches of a square."""

    def __init__(self, size: int, merge: int):
        super().__init__()
        self.merging_layer = nn.Linear(size * merge**2, size, bias=False)
        self._merge = merge

    def __call__(self, x: mx.array, height: int, width: int) -> mx.array:
        merge = self._merge
        x = x.reshape(height // merge, merge, width // merge, merge, -1).transpose(0, 2, 4, 1, 3)
        return self.merging_layer(x.reshape(height * width // merge**2, -1))
