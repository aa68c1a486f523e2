"""The vision towers of Gemma 3 (https://arxiv.org/abs/2503.19786) and Gemma 4, with the projector
that makes their output as long as what the language model reads. On the MLX thread.

The language model multiplies what it reads by a number; the towers divide by it before."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy
from mlx.utils import tree_flatten

from _mlx_server.inference.images.image_layout import Gemma3Layout, Gemma4Layout
from _mlx_server.inference.images.tower_parts import attend, colours, rotate, with_flat_kernel

_THETA = 100.0


class Gemma3Tower(nn.Module):
    """SigLIP, whose patches are averaged over squares. `config` is the model's config.json."""

    def __init__(self, config: dict[str, Any], layout: Gemma3Layout):
        super().__init__()
        tower, text = config["vision_config"], config["text_config"]
        size = tower["hidden_size"]
        self.embeddings = _SiglipEmbeddings(3 * layout.patch**2, layout.side**2, size)
        self.encoder = _SiglipEncoder(tower)
        self.post_layernorm = nn.LayerNorm(size, eps=tower.get("layer_norm_eps", 1e-6))
        self.multi_modal_projector = _Gemma3Projector(tower, text["hidden_size"])
        self._layout, self._inner = layout, tower["intermediate_size"]

    def __call__(self, pixels: numpy.ndarray) -> tuple[mx.array, list[mx.array]]:
        """What is read in place of an image's tokens, (tokens, hidden size), and nothing else.
        `pixels` are (height, width, 3) bytes."""
        layout = self._layout
        x = colours(pixels, layout)
        x = self.embeddings(_patches(x, layout.patch).swapaxes(1, 2).flatten(1))
        x = self.post_layernorm(self.encoder(x))
        return self.multi_modal_projector(_pooled(x, layout.side, layout.side, layout.merge)), []

    @property
    def patch_nbytes(self) -> int:
        """About how many bytes a patch takes while it is read."""
        return 4 * (8 * self.post_layernorm.weight.size + 2 * self._inner)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights of a checkpoint as they are here, without the head of the tower alone."""
        kept = {key: value for key, value in weights.items() if not key.startswith("head.")}
        return with_flat_kernel(kept, "embeddings.patch_embedding.weight")


class _SiglipEmbeddings(nn.Module):
    def __init__(self, numbers: int, patches: int, size: int):
        super().__init__()
        self.patch_embedding = nn.Linear(numbers, size)
        self.position_embedding = nn.Embedding(patches, size)
        self._patches = patches

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patch_embedding(x.astype(self.patch_embedding.bias.dtype))
        return x + self.position_embedding(mx.arange(self._patches))


class _SiglipEncoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.layers = [_SiglipLayer(config) for _ in range(config["num_hidden_layers"])]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class _SiglipLayer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        size, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-6)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(size, eps), nn.LayerNorm(size, eps)
        self.self_attn = _SiglipAttention(size, config["num_attention_heads"])
        self.mlp = _SiglipMLP(size, config["intermediate_size"])

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _SiglipAttention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(size, size) for _ in range(4)
        )
        self._heads = heads

    def __call__(self, x: mx.array) -> mx.array:
        projections = self.q_proj, self.k_proj, self.v_proj
        parts = (_heads(project(x), self._heads).swapaxes(0, 1) for project in projections)
        return self.out_proj(attend(*parts).swapaxes(0, 1).flatten(1))


class _SiglipMLP(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_approx(self.fc1(x)))


class _Gemma3Projector(nn.Module):
    def __init__(self, config: dict[str, Any], out: int):
        super().__init__()
        size = config["hidden_size"]
        self.mm_input_projection_weight = mx.zeros((size, out))
        self.mm_soft_emb_norm = nn.RMSNorm(size)
        self._eps = config.get("layer_norm_eps", 1e-6)
        self._scale = mx.array(math.sqrt(out), mx.bfloat16)  # rounded as by mlx-lm

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.fast.rms_norm(x, 1 + self.mm_soft_emb_norm.weight, self._eps)
        return (x @ self.mm_input_projection_weight) / self._scale.astype(x.dtype)


class Gemma4Tower(nn.Module):
    """A tower for images of any proportions, whose patches are averaged over squares. `config` is
    the model's config.json."""

    def __init__(self, config: dict[str, Any], layout: Gemma4Layout):
        super().__init__()
        tower, text = config["vision_config"], config["text_config"]
        size = tower["hidden_size"]
        self.patch_embedder = _PatchEmbedder(tower, 3 * layout.patch**2)
        self.encoder = _Gemma4Encoder(tower)
        self.std_bias, self.std_scale = mx.zeros(size), mx.ones(size)
        self.embed_vision = _Gemma4Projector(tower, text["hidden_size"])
        self._layout, self._size, self._inner = layout, size, tower["intermediate_size"]

    def __call__(self, pixels: numpy.ndarray) -> tuple[mx.array, list[mx.array]]:
        """What is read in place of an image's tokens, (tokens, hidden size), and nothing else.
        `pixels` are (height, width, 3) bytes."""
        layout = self._layout
        x = (colours(pixels, layout) - 0.5) * 2
        rows, columns = (length // layout.patch for length in pixels.shape[:2])
        down, across = numpy.indices((rows, columns)).reshape(2, -1)
        x = self.patch_embedder(_patches(x, layout.patch).flatten(1), down, across)
        x = self.encoder(x, down, across)
        # Large numbers that become small ones again
        pooled = _pooled(x.astype(mx.float32), rows, columns, layout.merge) * math.sqrt(self._size)
        return self.embed_vision(((pooled - self.std_bias) * self.std_scale).astype(x.dtype)), []

    @property
    def patch_nbytes(self) -> int:
        """About how many bytes a patch takes while it is read."""
        return 4 * (8 * self._size + 3 * self._inner)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights of a checkpoint and, where it has none, bounds and standards that change
        nothing."""
        neutral = {
            name: value
            for name, value in tree_flatten(self.parameters())
            if name.startswith("std_") or name.endswith(("put_min", "put_max"))
        }
        return {**neutral, **weights}


class _PatchEmbedder(nn.Module):
    def __init__(self, config: dict[str, Any], numbers: int):
        super().__init__()
        size = config["hidden_size"]
        self.input_proj = nn.Linear(numbers, size, bias=False)
        self.position_embedding_table = mx.zeros((2, config["position_embedding_size"], size))

    def __call__(self, x: mx.array, down: numpy.ndarray, across: numpy.ndarray) -> mx.array:
        table = self.position_embedding_table
        positions = table[0, mx.array(across)] + table[1, mx.array(down)]
        return self.input_proj(x.astype(table.dtype)) + positions


class _Gemma4Encoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.layers = [_Gemma4Layer(config) for _ in range(config["num_hidden_layers"])]
        quarter = _head_size(config) // 4
        theta = (config.get("rope_parameters") or {}).get("rope_theta", _THETA)
        self._frequencies = theta ** (-numpy.arange(quarter, dtype=numpy.float32) / quarter)

    def __call__(self, x: mx.array, down: numpy.ndarray, across: numpy.ndarray) -> mx.array:
        angles = [
            mx.array((place[:, None] * self._frequencies).astype(numpy.float32))
            for place in (across, down)
        ]
        rotations = [(mx.cos(angle), mx.sin(angle)) for angle in angles]
        for layer in self.layers:
            x = layer(x, rotations)
        return x


class _Gemma4Layer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        size, eps = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        self.self_attn = _Gemma4Attention(config, eps)
        self.mlp = _Gemma4MLP(size, config["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(size, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(size, eps)

    def __call__(self, x: mx.array, rotations: list[tuple[mx.array, mx.array]]) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), rotations)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class _Gemma4Attention(nn.Module):
    """The first half of a head is rotated by the place across, the second one by that down."""

    def __init__(self, config: dict[str, Any], eps: float):
        super().__init__()
        size, head = config["hidden_size"], _head_size(config)
        self._heads, self._head, self._eps = config["num_attention_heads"], head, eps
        self._shared = config.get("num_key_value_heads", self._heads)
        self.q_proj = _BoundedLinear(size, self._heads * head)
        self.k_proj = _BoundedLinear(size, self._shared * head)
        self.v_proj = _BoundedLinear(size, self._shared * head)
        self.o_proj = _BoundedLinear(self._heads * head, size)
        self.q_norm, self.k_norm = nn.RMSNorm(head, eps), nn.RMSNorm(head, eps)

    def __call__(self, x: mx.array, rotations: list[tuple[mx.array, mx.array]]) -> mx.array:
        def rotated(x: mx.array) -> mx.array:
            halves = mx.split(x.swapaxes(0, 1), 2, axis=-1)
            turned = [rotate(half, *one) for half, one in zip(halves, rotations, strict=True)]
            return mx.concatenate(turned, axis=-1)

        queries = rotated(self.q_norm(_heads(self.q_proj(x), self._heads)))
        keys = rotated(self.k_norm(_heads(self.k_proj(x), self._shared)))
        values = mx.fast.rms_norm(_heads(self.v_proj(x), self._shared), None, self._eps)
        x = attend(queries, keys, values.swapaxes(0, 1), scale=1.0)
        return self.o_proj(x.swapaxes(0, 1).flatten(1))


class _Gemma4MLP(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = _BoundedLinear(size, inner), _BoundedLinear(size, inner)
        self.down_proj = _BoundedLinear(inner, size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class _BoundedLinear(nn.Module):
    """A linear layer that some checkpoints have bounds for."""

    def __init__(self, size: int, out: int):
        super().__init__()
        self.linear = nn.Linear(size, out, bias=False)
        self.input_min, self.output_min = mx.array(-mx.inf), mx.array(-mx.inf)
        self.input_max, self.output_max = mx.array(mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        kind = x.dtype
        x = self.linear(mx.clip(x, self.input_min, self.input_max).astype(kind))
        return mx.clip(x, self.output_min, self.output_max).astype(kind)


class _Gemma4Projector(nn.Module):
    def __init__(self, config: dict[str, Any], out: int):
        super().__init__()
        self.embedding_projection = nn.Linear(config["hidden_size"], out, bias=False)
        self._eps, self._scale = config.get("rms_norm_eps", 1e-6), math.sqrt(out)

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(x, None, self._eps)) / self._scale


def _patches(x: mx.array, patch: int) -> mx.array:
    """(patches, numbers of a channel, channels), row by row."""
    height, width, channels = x.shape
    x = x.reshape(height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(1, 2).reshape(-1, patch**2, channels)


def _pooled(x: mx.array, rows: int, columns: int, side: int) -> mx.array:
    """The averages over squares of patches, row by row."""
    squares = x.reshape(rows // side, side, columns // side, side, -1)
    return squares.mean(axis=(1, 3)).flatten(0, 1)


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _heads(x: mx.array, heads: int) -> mx.array:
    return x.reshape(x.shape[0], heads, -1)
