"""Models of mlx-lm's families with random weights, so small that each is built in a moment."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

# What a field of a family's config is, if it has one of that name; others keep their default, or
# are None.
VALUES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 4096),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-5
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "tie_word_embeddings"), False),
    **dict.fromkeys(("linear_num_value_heads", "linear_conv_kernel_dim", "conv_kernel"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(
        ("logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier"),
        1.0,
    ),
    **dict.fromkeys(("state_size", "time_step_rank", "num_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("expand", "n_groups", "full_attention_interval", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("chunk_size", "sliding_window"), 16),
    "intermediate_size": 96,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 1.0,
    "use_conv_bias": True,
    "time_step_limit": (0.001, 0.1),
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16.0,
    "rope_scaling": None,
    "layer_types": None,
}
PLAIN = [
    "Klear",
    "apertus",
    "cohere",
    "deepseek",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "exaone4",
    "gear",
    "gemma",
    "gemma2",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "internlm2",
    "internlm3",
    "laguna",
    "llama",
    "mimo",
    "mixtral",
    "nanbeige",
    "nanochat",
    "nemotron",
    "olmo2",
    "olmoe",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "talkie",
    "telechat3",
    "youtu_llm",
]
SLIDING = ["cohere2", "gpt_oss", "iquestloopcoder", "muse_glimmer", "olmo3"]
SEVERAL = ["deepseek_v32"]  # caches a layer
RECURRENT = ["bailing_moe_v3", "mamba", "mamba2", "olmo_hybrid", "plamo2", "qwen3_next"]
UNSUPPORTED = {
    "deepseek_v41": "cache class LayerCache is not known",
    "plamo3": "sees further when it reads several tokens",
}


def tiny(family: str) -> Any:
    """A model of the family."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    module = importlib.import_module(f"mlx_lm.models.{family}")
    config: dict[str, Any] = {"model_type": family}
    for field in dataclasses.fields(module.ModelArgs):
        if field.name in VALUES:
            config[field.name] = VALUES[field.name]
        elif field.default is field.default_factory is dataclasses.MISSING:
            config.setdefault(field.name, None)
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = [
        (name, mx.random.normal(value.shape) * 0.2)
        for name, value in tree_flatten(model.parameters())
        if value.ndim > 1 and value.dtype == mx.float32
    ]
    model.load_weights(weights, strict=False)
    return model
