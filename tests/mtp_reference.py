"""The MTP head of Qwen3.5 and Qwen3-Next in numpy, from tensors as trainers save them: written from
the formulas, without a cache, a token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def logits(
    config: dict[str, Any],
    head: Arrays,
    embedding: np.ndarray,
    output: np.ndarray,
    hidden: np.ndarray,
    tokens: list[int],
    guesses: int,
) -> list[np.ndarray]:
    """What the head says behind the last of some tokens, and behind its own likeliest guesses.
    `head` has the names behind "mtp.", `hidden` are the last hidden states of all tokens but
    the last, (tokens - 1, size)."""
    states, read = list(hidden), list(tokens)
    said = []
    for _ in range(guesses):
        pairs = [
            np.concatenate(
                [
                    norm(config, embedding[token], head["pre_fc_norm_embedding.weight"]),
                    norm(config, state, head["pre_fc_norm_hidden.weight"]),
                ]
            )
            for token, state in zip(read[1:], states, strict=True)
        ]
        x = np.stack(pairs) @ head["fc.weight"].T
        part = {name.removeprefix("layers.0."): array for name, array in head.items()}
        x = x + attention(config, part, norm(config, x, part["input_layernorm.weight"]))
        after = norm(config, x, part["post_attention_layernorm.weight"])
        x = x + (experts if "mlp.gate.weight" in part else feed_forward)(config, part, after)
        state = norm(config, x[-1], head["norm.weight"])
        said.append(output @ state)
        states.append(state)
        read.append(int(said[-1].argmax()))
    return said


def norm(config: dict[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * (1 + weight)


def attention(config: dict[str, Any], part: Arrays, x: np.ndarray) -> np.ndarray:
    """Each head's output is multiplied with a gate, which comes with its query."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["head_dim"], len(x)
    both = (x @ part["self_attn.q_proj.weight"].T).reshape(length, heads, 2 * size)
    queries, gates = both[..., :size], both[..., size:]
    keys = (x @ part["self_attn.k_proj.weight"].T).reshape(length, groups, size)
    values = (x @ part["self_attn.v_proj.weight"].T).reshape(length, groups, size)
    queries = rotated(config, norm(config, queries, part["self_attn.q_norm.weight"]))
    keys = rotated(config, norm(config, keys, part["self_attn.k_norm.weight"]))
    out = np.zeros((length, heads, size))
    for head in range(heads):
        group = head * groups // heads
        for at in range(length):
            scores = keys[: at + 1, group] @ queries[at, head] / np.sqrt(size)
            chances = np.exp(scores - scores.max())
            out[at, head] = chances / chances.sum() @ values[: at + 1, group]
    return (out * sigmoid(gates)).reshape(length, -1) @ part["self_attn.o_proj.weight"].T


def rotated(config: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """The first numbers of each head turned by angles that grow with the place."""
    rope = config.get("rope_parameters") or config
    size = int(config["head_dim"] * rope["partial_rotary_factor"])
    half = size // 2
    angles = np.outer(np.arange(len(x)), rope["rope_theta"] ** (-np.arange(half) / half))
    cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
    one, other, rest = x[..., :half], x[..., half:size], x[..., size:]
    turned = [one * cosines - other * sines, other * cosines + one * sines, rest]
    return np.concatenate(turned, axis=-1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gates = x @ gate.T
    return (gates * sigmoid(gates) * (x @ up.T)) @ down.T


def feed_forward(
    config: dict[str, Any], part: Arrays, x: np.ndarray, of: str = "mlp"
) -> np.ndarray:
    return gated(x, *(part[f"{of}.{name}_proj.weight"] for name in ("gate", "up", "down")))


def experts(config: dict[str, Any], part: Arrays, x: np.ndarray) -> np.ndarray:
    """The likeliest experts of each token, weighted, and one that all tokens share."""
    shared = feed_forward(config, part, x, "mlp.shared_expert")
    out = sigmoid(x @ part["mlp.shared_expert_gate.weight"].T) * shared
    scores = x @ part["mlp.gate.weight"].T
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    for at, row in enumerate(chances):
        best = row.argsort()[-config["num_experts_per_tok"] :]
        for expert in best:
            out[at] += row[expert] / row[best].sum() * one_expert(part, expert, x[at])
    return out


def one_expert(part: Arrays, expert: int, x: np.ndarray) -> np.ndarray:
    """Experts are saved one by one, or all in one tensor."""
    if "mlp.experts.gate_up_proj" in part:
        gate, up = np.split(part["mlp.experts.gate_up_proj"][expert], 2)
        return gated(x, gate, up, part["mlp.experts.down_proj"][expert])
    names = (f"mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return gated(x, *(part[name] for name in names))
