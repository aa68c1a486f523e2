"""The MTP head of Qwen's models from Qwen3-Next on: one more layer, which guesses the token after
the next.

For a token it joins the token's embedding and the model's last hidden state of the token before, as
it is behind the model's own norm, and reads them with an attention over its own history of such
pairs. The embedding and the output head are the model's.

Its history is part of the model's state. A model with a head has two more layers of cache: the
hidden state of the last token, and the keys and values of the pairs. Both are functions of the
tokens that were read, as in every other layer, so they are kept, copied, cut, merged and written as
those of other layers are. The first token has no hidden state before it: its pair is never seen.
Keys and values come before the attention, so to read along takes no more than two projections; only
guesses take the whole layer. On the MLX thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.catalog.mtp_files import HeadFiles

_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(.+)")


class Before(nn.Module):
    """The hidden states before those of some tokens; that of the last token is kept in a cache."""

    def __call__(self, hidden: mx.array, cache: Any) -> mx.array:
        """Of (rows, tokens, size), one token further back."""
        length = hidden.shape[1]
        last = mx.zeros_like(hidden[:, :1]) if cache[0] is None else cache[0]
        states = mx.concatenate([last, hidden], axis=1)
        if cache.lengths is None:
            cache[0] = mx.contiguous(states[:, length:])
        else:  # of rows that are padded on the right
            ends = mx.clip(cache.lengths, 0, length)
            cache[0] = mx.take_along_axis(states, ends[:, None, None], axis=1)
        cache.advance(length)
        return states[:, :length]


class Head(nn.Module):
    """The head alone. Its parameters have the names that they have in files."""

    def __init__(self, layer: nn.Module, size: int, eps: float):
        """`layer` is one of the model's kind with full attention."""
        super().__init__()
        self.pre_fc_norm_embedding = nn.RMSNorm(size, eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(size, eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = [layer]
        self.norm = nn.RMSNorm(size, eps)
        self.before = Before()

    def join(self, embeddings: mx.array, before: mx.array) -> mx.array:
        """What the layer reads: (rows, tokens, size) of tokens and of the hidden states before."""
        pairs = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(before)]
        return self.fc(mx.concatenate(pairs, axis=-1))

    def read(self, embeddings: mx.array, hidden: mx.array, cache: Sequence[Any]) -> list[mx.array]:
        """Adds tokens, and the model's hidden states of them, to the head's state; returns arrays
        whose evaluation does so."""
        last, history = cache
        layer = self.layers[0]
        x = layer.input_layernorm(self.join(embeddings, self.before(hidden, last)))
        attention, (rows, length, _) = layer.self_attn, x.shape
        shape = rows, length, attention.num_key_value_heads, -1
        keys = attention.k_norm(attention.k_proj(x).reshape(shape)).swapaxes(1, 2)
        values = attention.v_proj(x).reshape(shape).swapaxes(1, 2)
        keys = attention.rope(keys, offset=history.offset)
        history.update_and_fetch(keys, values)
        state = tree_flatten([history.state, last.state])
        return [array for _, array in state if isinstance(array, mx.array)]

    def step(self, embedding: mx.array, hidden: mx.array, history: Any) -> mx.array:
        """The head's hidden state for a token, all (1, 1, size). It guesses the token behind it,
        and takes the place of the model's hidden state in the next step."""
        x = self.join(embedding, hidden)
        state: mx.array = self.norm(self.layers[0](x, mask=None, cache=Seen(history)))
        return state


class Seen:
    """What is seen of a history: all but the first token."""

    def __init__(self, cache: Any):
        self._cache = cache
        if hasattr(cache, "bits"):  # by which mlx-lm tells quantised ones
            self.bits, self.group_size = cache.bits, cache.group_size

    @property
    def offset(self) -> int:
        """How many tokens it has, the first one included."""
        return int(self._cache.offset)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As mlx-lm's."""
        arrays = self._cache.update_and_fetch(keys, values)
        return tree_map(lambda array: array[..., 1:, :], arrays)


def attach(local: LocalModel, model: Any, files: HeadFiles) -> None:
    """Loads a head, and has it read along with all that the model reads. Raises an exception, and
    changes nothing then, if the head does not fit the model."""
    head = _load(local, model, files)
    model.mtp = head
    model.__class__ = _with_head(type(model))


def guess(
    model: Any,
    cache: Sequence[Any],
    token: int,
    count: int,
    pick: Callable[[mx.array, int], mx.array],
) -> list[int]:
    """What may follow `token`, which comes behind all that was read into a model's caches: so many
    tokens. `pick` picks the token (1) at an index from log-probabilities (1, vocabulary)."""
    last, history = cache[-2:]
    tokens, hidden = [mx.array([token])], last[0]
    for at in range(count):
        hidden = model.mtp.step(model.embed(tokens[-1][None]), hidden, history)
        logits = model.predict(hidden)[:, 0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens.append(pick(logprobs, at))
    guessed: list[int] = mx.concatenate(tokens[1:]).tolist()
    history.trim(count)
    return guessed


def _with_head(kind: Any) -> Any:
    """A model's class, for one that has a head."""
    from mlx_lm.models.cache import ArraysCache, KVCache

    class WithHead(kind):  # type: ignore[misc]
        @property
        def core(self) -> Any:
            return getattr(self, "language_model", self)

        def embed(self, tokens: mx.array) -> mx.array:
            return self.core.model.embed_tokens(tokens)

        def predict(self, hidden: mx.array) -> mx.array:
            if self.core.args.tie_word_embeddings:
                return self.core.model.embed_tokens.as_linear(hidden)
            return self.core.lm_head(hidden)

        def make_cache(self) -> list[Any]:
            return [*super().make_cache(), ArraysCache(1), KVCache()]

        def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
            hidden = self.core.model(inputs, cache, **options)
            if cache is None:
                return self.predict(hidden)
            embeddings = options.get("input_embeddings")
            if embeddings is None:
                embeddings = self.embed(inputs)
            read = self.mtp.read(embeddings, hidden, cache[-2:])
            return self.predict(mx.depends([hidden], read)[0])

    WithHead.__name__ = WithHead.__qualname__ = kind.__name__
    WithHead.__module__ = kind.__module__
    return WithHead


def _load(local: LocalModel, model: Any, files: HeadFiles) -> Head:
    """The head with its weights, as precise as the model's are."""
    from mlx_lm.utils import infer_quant_config

    core: Any = getattr(model, "language_model", model)
    place, layer = next(
        (at, one) for at, one in enumerate(core.model.layers) if hasattr(one, "self_attn")
    )
    args = core.args
    head = Head(type(layer)(args, place), args.hidden_size, args.rms_norm_eps)
    weights = _weights(files, core.model.norm.weight.dtype)
    quantised = any(name.endswith(".scales") for name in weights)

    def recipe(name: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        return f"{name}.scales" in weights and infer_quant_config(name, module, weights)

    layers: Any = nn
    layers.quantize(head, class_predicate=recipe)
    head.load_weights(list(weights.items()))
    if not quantised and (own := local.config.get("quantization")):
        options = {name: own[name] for name in ("group_size", "bits", "mode") if name in own}

        def fits(name: str, module: Any) -> bool:
            gate = name.endswith("gate")  # of experts
            size = own["group_size"]
            return (
                hasattr(module, "to_quantized") and not gate and not module.weight.shape[-1] % size
            )

        layers.quantize(head, class_predicate=fits, **options)
    head.eval()
    mx.eval(head.parameters())
    return head


def _weights(files: HeadFiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """A head's tensors by their names in `Head`, numbers in `dtype`."""
    found: dict[str, mx.array] = {}
    for path in files.files:
        held: Any = mx.load(str(path))
        found |= {inner: array for name, array in held.items() if (inner := files.name(name))}
    weights: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in found.items():
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        if name.endswith(".experts.gate_up_proj"):
            block, middle = name.removesuffix(".experts.gate_up_proj"), array.shape[-2] // 2
            weights[f"{block}.switch_mlp.gate_proj.weight"] = array[..., :middle, :]
            weights[f"{block}.switch_mlp.up_proj.weight"] = array[..., middle:, :]
        elif name.endswith(".experts.down_proj"):
            block = name.removesuffix(".experts.down_proj")
            weights[f"{block}.switch_mlp.down_proj.weight"] = array
        elif match := _EXPERT.fullmatch(name):
            part = experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})
            part[int(match[2])] = array
        else:
            weights[name] = _shifted(name, array, files)
    for name, parts in experts.items():
        weights[name] = mx.stack([parts[at] for at in sorted(parts)])
    return weights


def _shifted(name: str, array: mx.array, files: HeadFiles) -> mx.array:
    """A norm's weights as MLX wants them; others as they are. Trainers save what a norm's weights
    differ from 1 by. Conversions have added that 1, or have left a head as it was, or have done so
    for some of its norms: then the numbers tell. Those of the norms of what is joined are small,
    yet above 0; the others' are about 1."""
    if not files.prefixed or array.ndim != 1 or "norm" not in name:
        return array
    least = 0.1 if name.startswith("pre_fc_norm") else 0.5
    raw = files.raw or array.astype(mx.float32).mean().item() < least
    return array + 1 if raw else array
