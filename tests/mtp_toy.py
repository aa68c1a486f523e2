"""A small model of Qwen3.5's shape with an MTP head, trained on a simple language.

A text is pairs of a key and a value: a random letter, then the digit that belongs to it in this
text. What follows a letter that stood before is known to whom has read the text; a head that has
not, or that is fed anything but what it was trained on, cannot know.

`python tests/mtp_toy.py` trains the model anew, in some minutes, and writes `tests/mtp`."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from models import build_tokenizer

WEIGHTS = Path(__file__).parent / "mtp" / "toy.safetensors"
KEYS, VALUES = "ABCDEF", "0123456789"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    },
}
CONFIG = {
    "model_type": "qwen3_5",
    "text_config": _TEXT,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def text(pairs: int, seed: int) -> str:
    """A text of so many pairs, which differs by its seed."""
    pick = random.Random(seed)
    values = {key: pick.choice(VALUES) for key in KEYS}
    keys = pick.choices(KEYS, k=pairs)
    return "".join(key + values[key] for key in keys)


def build(path: Path, weights: dict[str, Any], **config: Any) -> Path:
    """Writes a model with these weights to a folder and returns it."""
    import mlx.core as mx

    build_tokenizer(path, TEMPLATE)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def trained() -> dict[str, Any]:
    """The trained weights, as MLX wants them; the head's begin with "mtp."."""
    import mlx.core as mx

    held: Any = mx.load(str(WEIGHTS))
    return {name: array.astype(mx.float32) for name, array in held.items()}


# ------------------------------------------------------------------ training

LENGTH, BATCH, STEPS, RATE = 40, 16, 2000, 5e-3


def untrained() -> Any:
    """A model with a head as its `mtp`."""
    import mlx.core as mx
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    from _mlx_server.inference.speculation.mtp import Head

    mx.random.seed(1)
    model = Model(ModelArgs.from_dict(CONFIG))
    core = model.language_model
    layer = type(core.layers[1])(core.args, 1)
    model.mtp = Head(layer, core.args.hidden_size, core.args.rms_norm_eps)
    # It forgets at once, so that it can be trained without a loop over tokens; its convolution
    # sees what stands before a token.
    linear = core.layers[0].linear_attn
    linear.A_log, linear.dt_bias = mx.full((2,), 8.0), mx.ones((2,))
    linear.in_proj_a.weight = mx.zeros_like(linear.in_proj_a.weight)
    linear.freeze(recurse=False, keys=["A_log", "dt_bias"])
    linear.in_proj_a.freeze()
    # As in large models the numbers of the last norm differ, and what precedes it does not pass
    # for what follows.
    core.model.norm.weight = mx.exp(mx.random.uniform(-1.5, 1.2, (core.args.hidden_size,)))
    return model


def forgetful(q: Any, k: Any, v: Any, a: Any, b: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    """mlx-lm's `gated_delta_update` where all is forgotten at once."""
    import mlx.core as mx

    each = v.shape[2] // k.shape[2]
    seen = mx.repeat((q * k).sum(-1, keepdims=True), each, axis=2)
    return seen * mx.sigmoid(b)[..., None] * v, None


def loss(model: Any, tokens: Any, known: Any) -> Any:
    """What the model's and the head's guesses lack, for tokens given as indices of `known` ones."""
    import mlx.core as mx
    from mlx.nn.losses import cross_entropy

    body, head = model.language_model.model, model.mtp
    embeddings = body.embed_tokens(known)
    read = embeddings[tokens]
    hidden = body(tokens, input_embeddings=read)
    pairs = head.join(read[:, 1:], hidden[:, :-1])
    guessed = head.norm(head.layers[0](pairs, mask="causal"))
    own = cross_entropy(hidden[:, :-1] @ embeddings.T, tokens[:, 1:], reduction="mean")
    ahead = cross_entropy(guessed[:, :-1] @ embeddings.T, tokens[:, 2:], reduction="mean")
    return own + ahead, mx.stack([own, ahead])


def train() -> None:
    import mlx.core as mx
    from mlx import nn, optimizers
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_5
    from tokenizers import Tokenizer

    folder = Path(tempfile.mkdtemp())
    build_tokenizer(folder, TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = KEYS + VALUES
    ids = [tokenizer.token_to_id(one) for one in letters]
    assert tokenizer.encode(text(9, 1)).ids == [ids[letters.index(one)] for one in text(9, 1)]
    model = untrained()
    rate = optimizers.cosine_decay(RATE, STEPS, RATE / 50)
    optimizer = optimizers.AdamW(learning_rate=rate, weight_decay=0.0)
    step = nn.value_and_grad(model, loss)
    qwen3_5.gated_delta_update = forgetful
    for number in range(STEPS):
        texts = [text(LENGTH // 2, number * BATCH + at + 1000) for at in range(BATCH)]
        tokens = mx.array([list(map(letters.index, line)) for line in texts])
        (_, parts), gradients = step(model, tokens, mx.array(ids))
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, parts)
        if number % 50 == 0:
            print(number, *(f"{part:.3f}" for part in parts.tolist()), flush=True)
    weights = {name: array.astype(mx.float16) for name, array in tree_flatten(model.parameters())}
    WEIGHTS.parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(WEIGHTS), weights, {"format": "mlx"})


if __name__ == "__main__":
    train()
