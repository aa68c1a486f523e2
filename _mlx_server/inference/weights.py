"""What mlx-lm's loader needs to be told about some models."""

from __future__ import annotations

import re
from typing import Any

from _mlx_server.inference.models import LocalModel, read_json_file


def pooling_mode(local: LocalModel) -> str:
    """Which of an embedding model's states is the embedding: "lasttoken" or "cls", the first, or
    their "mean". Its folder says so with a word or, older ones, with a flag for each.
    https://sbert.net/docs/package_reference/sentence_transformer/models.html Raises ValueError for
    any other pooling."""
    file = local.path / "1_Pooling" / "config.json"
    config = read_json_file(file) if file.is_file() else {"pooling_mode": "lasttoken"}
    flags = [
        re.sub("^pooling_mode_|_tokens?$", "", key)
        for key in config
        if key.startswith("pooling_mode_") and config[key]
    ]
    mode = config.get("pooling_mode") or " and ".join(flags)
    if mode not in ("lasttoken", "cls", "mean"):
        raise ValueError(f"its pooling '{mode}' is not supported")
    return mode


def model_body(model: Any) -> Any:
    """The part of an mlx-lm model that comes before its head; None where it has another name."""
    model = getattr(model, "language_model", model)
    return next(
        (
            body
            for name in ("model", "transformer", "backbone")
            if (body := getattr(model, name, None))
        ),
        None,
    )


def headless_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config, whose weights may be those of the body alone: without its name
    before theirs, and without a head."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)

    class Headless(model_class):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if not any(name.startswith(("model.", "language_model.")) for name in weights):
                weights = {f"model.{name}": value for name, value in weights.items()}
            weights = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            if not any(name.startswith("lm_head.") for name in weights):
                self.pop("lm_head", None)
            return weights

    return Headless, args_class
