"""Models with an MTP head of random weights, in the forms in which they are found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import vision_models
from models import CONFIGS, build_tokenizer

from _mlx_server.inference.catalog.models import LocalModel, describe

_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
KINDS = {
    "qwen3_5": vision_models.CONFIGS["qwen3_5"],
    "qwen3_5_moe": vision_models.CONFIGS["qwen3_5_moe"],
    "qwen3_next": {**CONFIGS["hybrid"], **_EXPERTS},
}
# Of the checkpoint: as trainers save it; converted by MLX with the head in it; the same, but with
# the norms of the head's layer as they were. A folder of its own: converted, also quantised.
FORMS = ["raw", "converted", "mixed", "sidecar", "quantised"]
_NORM = re.compile(r".*norm(?:_embedding|_hidden)?\.weight")


def config(kind: str) -> dict[str, Any]:
    """A model's config.json."""
    shown = {name: value for name, value in KINDS[kind].items() if name != "vision_config"}
    return {**shown, "eos_token_id": 2, "torch_dtype": "float32"}


def text_config(kind: str) -> dict[str, Any]:
    """The language model's part of it."""
    known = config(kind)
    return dict(known.get("text_config") or known)


def weights(kind: str) -> dict[str, Any]:
    """Random weights as MLX wants them, the head's with "mtp." before their names."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from _mlx_server.inference.speculation.mtp import Head

    mx.random.seed(3)
    model_class, args_class = _get_classes(config(kind))
    model = model_class(args_class.from_dict(config(kind)))
    core = getattr(model, "language_model", model)
    layer = type(core.layers[1])(core.args, 1)
    model.mtp = Head(layer, core.args.hidden_size, core.args.rms_norm_eps)
    found = {}
    for name, value in tree_flatten(model.parameters()):
        value = mx.random.normal(value.shape) * 0.2 if value.ndim > 1 else value
        if _NORM.fullmatch(name):  # those of what is joined are small
            middle = 0.3 if "pre_fc" in name else 1.0
            value = middle + 0.1 * mx.random.normal(value.shape)
        found[name] = value
    return found


def raw(kind: str, held: dict[str, Any]) -> dict[str, Any]:
    """Weights as trainers save them."""
    found = {}
    for name, value in held.items():
        if kind != "qwen3_next":
            name = name.replace("language_model.model.", "model.language_model.")
            name = name.replace("language_model.lm_head", "lm_head")
        if _NORM.fullmatch(name) and "linear_attn" not in name:
            value = value - 1
        if "conv1d" in name:
            value = value.swapaxes(1, 2)
        found[name] = value
    return _with_raw_experts(kind, found)


def _with_raw_experts(kind: str, held: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx

    for name in [name for name in held if name.endswith("switch_mlp.gate_proj.weight")]:
        block = name.removesuffix("switch_mlp.gate_proj.weight")
        parts = {
            part: held.pop(f"{block}switch_mlp.{part}_proj.weight")
            for part in ("gate", "up", "down")
        }
        if kind == "qwen3_next":
            for part, array in parts.items():
                for expert, one in enumerate(array):
                    held[f"{block}experts.{expert}.{part}_proj.weight"] = one
        else:
            both = mx.concatenate([parts["gate"], parts["up"]], axis=-2)
            held[f"{block}experts.gate_up_proj"] = both
            held[f"{block}experts.down_proj"] = parts["down"]
    return held


def build(folder: Path, kind: str, form: str) -> LocalModel:
    """Writes a model into a folder, and perhaps its head beside it; returns the model."""
    held = weights(kind)
    path = folder / "Some-1B-4bit"
    build_tokenizer(path)
    (path / "config.json").write_text(json.dumps(config(kind)))
    head = {name: array for name, array in held.items() if name.startswith("mtp.")}
    body = {name: array for name, array in held.items() if name not in head}
    if form == "raw":
        _save(path, raw(kind, held), "pt")
    elif form in ("converted", "mixed"):
        before = "" if kind == "qwen3_next" else "language_model."
        inside = raw(kind, head) if form == "mixed" else head
        if form == "mixed":
            inside["mtp.norm.weight"] = head["mtp.norm.weight"]
        _save(path, body | {before + name: array for name, array in inside.items()})
    else:
        _save(path, body)
        bare = {name.removeprefix("mtp."): array for name, array in head.items()}
        sidecar = folder / "Some-1B-MTP-bf16"
        sidecar.mkdir(parents=True)
        (sidecar / "config.json").write_text(json.dumps({"model_type": "qwen3_5_mtp"}))
        _save(sidecar, _quantised(bare) if form == "quantised" else bare)
    return describe(path.name, path)


def _quantised(held: dict[str, Any]) -> dict[str, Any]:
    """The weights of 8 bits, but those of gates."""
    import mlx.core as mx

    found = {}
    for name, array in held.items():
        layer = name.removesuffix(".weight")
        if array.ndim < 2 or layer.endswith("gate"):
            found[name] = array
            continue
        packed, scales, biases = mx.quantize(array, group_size=32, bits=8)
        found |= {name: packed, f"{layer}.scales": scales, f"{layer}.biases": biases}
    return found


def _save(path: Path, held: dict[str, Any], format: str = "mlx") -> None:
    import mlx.core as mx

    mx.save_safetensors(str(path / "model.safetensors"), held, {"format": format})
