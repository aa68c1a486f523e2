"""Small models that see, with random weights that any program can make again from their names, and
two images. `tests/vision` holds what transformers computes with them."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from models import CHATML, build_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

FOLDER = Path(__file__).parent / "vision"
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
START, END, PAD = 512, 513, 514  # their tokens
MISTRAL_MARKS = ("[IMG_BREAK]", "[IMG_END]", "[IMG]")  # the same
GEMMA_MARKS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 515,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}
_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 48,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 96,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
}


def _qwen(model_type: str, text: dict, tower: dict) -> dict:
    return {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", **_TEXT, **text},
        "vision_config": {"model_type": f"{model_type}_vision", **_QWEN_TOWER, **tower},
        "image_token_id": PAD,
        "video_token_id": 3,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }


_QWEN3_ROPE = {
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
}
_QWEN3_MOE = {**_EXPERTS, **_QWEN3_ROPE, "mlp_only_layers": [], "decoder_sparse_step": 1}
_QWEN35_MOE = {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 32}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 2]}
_PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 48,
    "hidden_act": "silu",
    "image_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 8,
    "rope_theta": 10000.0,
}


def _mistral(model_type: str, text: dict, merge: dict) -> dict:
    return {
        "model_type": model_type,
        "text_config": {**_TEXT, **text},
        "vision_config": _PIXTRAL_TOWER,
        "image_token_index": PAD,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        **merge,
    }


_MISTRAL = {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": None}
_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_MERGED = {"spatial_merge_size": 2, "multimodal_projector_bias": False}
_PLAIN = {"vision_feature_select_strategy": "full", "multimodal_projector_bias": True}


def _gemma(model_type: str, text: dict, tower: dict, **fields) -> dict:
    return {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", **_GEMMA_TEXT, **text},
        "vision_config": tower,
        "vocab_size": _TEXT["vocab_size"],
        "tie_word_embeddings": True,
        **fields,
    }


# Images have more tokens than the window
_GEMMA_TEXT = {**_TEXT, "tie_word_embeddings": True, "sliding_window": 40, "pad_token_id": 0}
_GEMMA3 = {
    "query_pre_attn_scalar": 32,
    "sliding_window_pattern": 2,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
    "vision_use_head": False,
}
_GEMMA3_TOKENS = {
    "mm_tokens_per_image": 64,
    "boi_token_index": START,
    "eoi_token_index": END,
    "image_token_index": PAD,
}
_GEMMA4_TOKENS = {
    "boi_token_id": START,
    "eoi_token_id": END,
    "image_token_id": PAD,
    "audio_config": None,
}
_GEMMA4 = {
    "global_head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
    },
}
_GEMMA4_SMALL = {
    **_GEMMA4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 515,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
_GEMMA4_LARGE = {
    **_GEMMA4,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "use_bidirectional_attention": "vision",
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_GEMMA4_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
_STANDARD = {"use_clipped_linears": True, "standardize": True}
CONFIGS = {
    "qwen3_vl": _qwen("qwen3_vl", _QWEN3_ROPE, _DEEPSTACK),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe", {**_QWEN3_MOE, "norm_topk_prob": True}, _DEEPSTACK),
    "qwen3_5": _qwen("qwen3_5", _LINEAR, {}),
    "qwen3_5_moe": _qwen("qwen3_5_moe", _QWEN35_MOE, {}),
    "mistral3": _mistral("mistral3", _MISTRAL, _MERGED),
    "ministral3": _mistral(
        "mistral3", {"model_type": "ministral3", "rope_parameters": _YARN}, _MERGED
    ),
    "pixtral": _mistral("llava", _MISTRAL, _PLAIN),
    "gemma3": _gemma("gemma3", _GEMMA3, _SIGLIP, **_GEMMA3_TOKENS),
    "gemma4": _gemma("gemma4", _GEMMA4_SMALL, _GEMMA4_TOWER, **_GEMMA4_TOKENS),
    "gemma4_large": _gemma(
        "gemma4", _GEMMA4_LARGE, {**_GEMMA4_TOWER, **_STANDARD}, **_GEMMA4_TOKENS
    ),
}
_PREPARATION = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 1024, "longest_edge": 16384},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.5],
    "image_std": [0.5, 0.5, 0.3],
}
_MISTRAL_PREPARATION = {
    "image_processor_type": "PixtralImageProcessor",
    "size": {"longest_edge": 128},
    "patch_size": {"height": 8, "width": 8},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_GEMMA3_PREPARATION = {
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.4],
}
_GEMMA4_PREPARATION = {
    "image_processor_type": "Gemma4ImageProcessor",
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "max_soft_tokens": 70,
}
_FAMILIES = {  # the special tokens of images and the preparation, by the tower's type
    "pixtral": (MISTRAL_MARKS, _MISTRAL_PREPARATION),
    "siglip_vision_model": (GEMMA_MARKS, _GEMMA3_PREPARATION),
    "gemma4_vision": (GEMMA_MARKS, _GEMMA4_PREPARATION),
}
TEXT = "What is different between these two?"


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """An image of coarse blocks with some noise: (height, width, 3) bytes."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 220, (height // 10 + 1, width // 10 + 1, 3))
    blocks = np.kron(coarse, np.ones((10, 10, 1), int))[:height, :width]
    return (blocks + random.randint(0, 30, blocks.shape)).astype(np.uint8)


PICTURES = [picture(90, 130, 1), picture(300, 170, 2)]  # the second one has to be made smaller


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random weights of these names and shapes."""
    weights = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
        if "post_feedforward_layernorm" in name:  # embeddings that are tied would weigh too much
            values = 3 + 0.1 * values
        elif re.search(r"norm\.weight$|\.norm.*weight$|_scale$|layer_scalar$", name):
            values = 1 + 0.1 * values
        elif name.endswith(("put_min", "put_max")):  # bounds
            values = np.array((1 + abs(values)) * (-1 if name.endswith("min") else 1))
        elif len(shape) > 1:
            values *= 1.5 / np.sqrt(shape[-1] if len(shape) < 4 else np.prod(shape[1:]))
        weights[name] = values.astype(np.float32)
    return weights


def write_files(kind: str, path: Path) -> None:
    """All files of a model but its weights."""
    config = {**CONFIGS[kind], "eos_token_id": 2, "torch_dtype": "float32"}
    family = config["vision_config"]["model_type"]
    marks, preparation = _FAMILIES.get(family, (MARKS, _PREPARATION))
    build_tokenizer(path, CHATML, marks)
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(preparation))


def _published(kind: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights as the published checkpoints have them: in some, transformers writes the experts in
    another form."""
    if kind == "qwen3_vl_moe":
        return {
            name: value.swapaxes(1, 2) if ".experts." in name else value
            for name, value in weights.items()
        }
    joined: dict[str, list[np.ndarray]] = {}
    for name in [name for name in weights if re.search(r"\.experts\.\d", name)]:
        layer, _, rest = name.partition(".experts.")
        joined.setdefault(f"{layer}.experts.{rest.split('.')[1]}", []).append(weights.pop(name))
    for name in [name for name in joined if name.endswith("gate_proj")]:
        gate = np.stack(joined.pop(name))
        up = np.stack(joined.pop(name.replace("gate", "up")))
        weights[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([gate, up], axis=1)
    return weights | {name: np.stack(values) for name, values in joined.items()}


def build_vision_model(kind: str, path: Path, *, tower: bool = True) -> Path:
    """Writes a loadable model of one of `CONFIGS` to `path` and returns it; without its `tower`,
    as a conversion for text alone has it, if that is wanted."""
    import mlx.core as mx

    write_files(kind, path)
    shapes = json.loads((FOLDER / f"{kind}.json").read_text())
    weights = {
        name: mx.array(values)
        for name, values in _published(kind, make_weights(shapes)).items()
        if tower or "visual" not in name and "vision" not in name
    }
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
    return path


def convert(
    folder: Path,
    changed: Callable[[str, mx.array], tuple[str, mx.array]],
    quantised: Callable[[str], bool],
    group_size: int,
) -> None:
    """Changes a model's weights as a conversion would, and keeps those that are `quantised`, by
    their new names, in 8 bits."""
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for old, value in mx.load(str(folder / "model.safetensors")).items():
        name, value = changed(old, value)
        if quantised(name) and value.ndim == 2:
            layer = name.removesuffix(".weight")
            packed = mx.quantize(value, group_size=group_size, bits=8)
            weights |= dict(zip((name, f"{layer}.scales", f"{layer}.biases"), packed, strict=True))
        else:
            weights[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": group_size, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
