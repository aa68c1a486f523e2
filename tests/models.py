"""Random-weight models of each cache class, built in a second: they have no skill, but real
tokenizers, templates, forward passes and caches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CHATML = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' or not loop.first %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for tool_call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ tool_call.function.name }}", "arguments": {{ tool_call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
CONFIGS = {
    "qwen2": {"model_type": "qwen2", **_SMALL},
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 32},
    "llama_sliding": {
        "model_type": "llama",
        **_SMALL,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "hybrid": {
        "model_type": "qwen3_next",
        **_SMALL,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0, 1, 2, 3],
        "moe_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "norm_topk_prob": True,
    },
}
# Its layers have caches of a class of their own, which can be neither trimmed nor merged
OPAQUE = {
    "model_type": "deepseek_v41",
    **_SMALL,
    "tie_word_embeddings": False,
    "head_dim": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "compress_ratios": [0, 0, 4, 4],
    "kv_source_layer_ids": [2],
    "index_source_layer_ids": [2],
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 2,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


def build_model(
    kind: str,
    path: Path,
    *,
    template: str = CHATML,
    seed: int = 7,
    config: dict | None = None,
    marks: Sequence[str] = (),
) -> Path:
    """Writes a loadable model of one of `CONFIGS`, or of another `config`, to `path` and returns
    it. Weights depend on `seed` only. `marks` are special tokens beside ChatML's."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    build_tokenizer(path, template, marks)
    config = {**(config or CONFIGS[kind]), "eos_token_id": 2, "torch_dtype": "float32"}
    config["vocab_size"] += len(marks)
    (path / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    weights = {
        name: mx.random.normal(value.shape) * 0.2 if value.ndim > 1 else value
        for name, value in tree_flatten(model.parameters())
    }
    tags = len(marks) + 4  # those of `build_tokenizer`, which no random answer should open
    weights["model.embed_tokens.weight"][-tags:] = 0
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def build_tokenizer(path: Path, template: str = CHATML, marks: Sequence[str] = ()) -> None:
    """Writes a byte-level BPE tokenizer of 512 entries with ChatML's special tokens, and `marks`
    behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=508,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__, CHATML, json.dumps(CONFIGS)], trainer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens(list(marks))
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        "model_max_length": 32768,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
