"""A model's weights, and the caches that they read into."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from _mlx_server.inference.cache.layers import is_opaque
from _mlx_server.inference.catalog.models import LocalModel, check_folder, load_error
from _mlx_server.inference.catalog.mtp_files import HeadFiles
from _mlx_server.inference.decoding.embedding import pooling_mode
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import StateSize
from _mlx_server.inference.protocol import first_line
from _mlx_server.inference.speculation.speculation import Speculation

log = logging.getLogger("mlx_server")


class Weights:
    """A model as mlx-lm loads it. On the MLX thread. Raises ModelLoadError.

    `model` is mlx-lm's, `body` the part of it before the head (None where mlx-lm has no name for
    it), `size` the bytes of the parameters, `state_size` what KV states take. `pooling` is set for
    embedding models. With `kv_bits` new caches keep plain KV quantised. `has_head` says that an MTP
    head reads along, as asked for with the files of one; its cache is part of the model's."""

    STRETCH = 256  # tokens

    def __init__(
        self, local: LocalModel, kv_bits: int | None, group: Group, head: HeadFiles | None = None
    ):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        self._config, self._kv_bits, self._group_size = local.config, kv_bits or 0, 0
        embeds = "embedding" in local.capabilities
        classes = _headless_classes if embeds else _known_classes
        try:
            check_folder(local)
            self.model = group.load(local.path, get_model_classes=classes)
            self.has_head = head is not None and self._attach(local, head)
            self.body = model_body(self.model)
            self.pooling = pooling_mode(local) if embeds else ""
            read = self.body if embeds else self.model
            cache = self.new_cache()
            # One token compiles the kernels, and shows what KV takes.
            mx.eval(read(mx.array([[0]]), cache=cache))
            if kv_bits and (group_size := self._quantised_group(cache)):
                self._group_size = group_size
                cache = self.new_cache()
                mx.eval(read(mx.array([[0]]), cache=cache))
            growth = self._growth(cache)
        except Exception as error:
            raise load_error(local, f"model '{local.name}'", error) from error
        parameters: Any = tree_flatten(self.model.parameters())
        size = sum(array.nbytes for _, array in parameters)
        self.size, self.state_size = group.broadcast(lambda: (size, StateSize.of(cache, growth)))
        self._name = local.name

    def _attach(self, local: LocalModel, head: HeadFiles) -> bool:
        """Has an MTP head read along; returns whether it can."""
        from _mlx_server.inference.speculation.mtp import attach

        try:
            attach(local, self.model, head)
        except Exception as error:
            log.warning("%s decodes without its MTP head: %s", local.name, first_line(error))
            return False
        log.info("%s has an MTP head, from %s", local.name, head.files[0].parent.name)
        return True

    def speculation(self, ends: Iterable[int]) -> Speculation | None:
        """What decodes several tokens a pass, up to one of the tokens `ends`; None for a model that
        cannot, with a line in the log."""
        if self.pooling:
            return None
        return Speculation.of(self._name, self.model, self.new_cache, ends)

    def _growth(self, cache: list[Any]) -> float:
        """Bytes that layers whose classes are opaque take for each further token."""
        import mlx.core as mx

        opaque = [layer for layer in cache if is_opaque(layer)]
        if not opaque:
            return 0.0
        sizes: list[int] = []
        for _ in range(2):  # after the first stretch sliding windows are full
            self.model(mx.array([[0] * self.STRETCH]), cache=cache)
            mx.eval([layer.state for layer in cache])
            sizes.append(sum(layer.nbytes for layer in opaque))
        return (sizes[1] - sizes[0]) / self.STRETCH

    @property
    def has_experts(self) -> bool:
        """Whether a token uses only some of the weights."""
        modules = self.model.modules()
        return any(type(module).__name__.endswith("SwitchLinear") for module in modules)

    def new_cache(self) -> list[Any]:
        """Empty mlx-lm caches, one a layer."""
        from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

        cache: list[Any] = make_prompt_cache(self.model)
        if not self._group_size:
            return cache
        return [
            QuantizedKVCache(self._group_size, self._kv_bits) if type(layer) is KVCache else layer
            for layer in cache
        ]

    def _quantised_group(self, cache: list[Any]) -> int:
        """How many numbers can share a scale in plain KV caches like these, which have read
        something; 0 if they cannot be quantised."""
        from mlx_lm.models.cache import KVCache

        config = self._config.get("text_config") or self._config
        heads = config.get("num_attention_heads", 1)
        sizes = {config.get("head_dim") or config.get("hidden_size", 0) // heads}
        plain: list[Any] = [layer for layer in cache if type(layer) is KVCache]
        for layer in plain:  # not every model goes by its config
            sizes |= {layer.keys.shape[-1], layer.values.shape[-1]}
        return next((size for size in (64, 32) if not any(one % size for one in sizes)), 0)


def model_body(model: Any) -> Any:
    """The part of an mlx-lm model that comes before its head; None where it has another name."""
    model = getattr(model, "language_model", model)
    bodies = (getattr(model, name, None) for name in ("model", "transformer", "backbone"))
    return next(filter(None, bodies), None)


def _known_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config. Qwen3-Next's takes no converted weights with an MTP head among
    them."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    if config.get("model_type") != "qwen3_next":
        return model_class, args_class

    class WithoutHead(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            without = {name: one for name, one in weights.items() if "mtp." not in name}
            return dict(super().sanitize(without))

    return WithoutHead, args_class


def _headless_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config, for weights that may be those of the body alone: without the
    body's name before theirs, and without a head."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)

    class Headless(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if not any(name.startswith(("model.", "language_model.")) for name in weights):
                weights = {f"model.{name}": value for name, value in weights.items()}
            weights = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            if not any(name.startswith("lm_head.") for name in weights):
                self.pop("lm_head", None)
            return weights

    return Headless, args_class
