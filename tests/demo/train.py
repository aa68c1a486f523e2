"""Trains the demo model and writes it in MLX's form: `python train.py --out FOLDER`. Needs torch,
tokenizers and jinja2.

The network is mlx-lm's `gear`: mixers of the last four tokens between layers of sliding attention.
The answer does not depend on what stands far above the request, and reading a prompt costs time
linear in its length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn.functional as F
from data import (
    BASH,
    EMOJI,
    FALLBACK,
    HELLO,
    PRIVET,
    ROWS,
    RUSSIAN,
    THOUGHT,
    TOOLS,
    Words,
    exchange,
    own_tools,
    tools,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).parent
VOCABULARY, WIDTH, HEADS, HEAD, INNER, WINDOW, RUN, THETA = 8192, 160, 4, 40, 256, 256, 4, 1e6
KINDS = ["conv_mixer", "sliding_attention", "conv_mixer", "sliding_attention", "sliding_attention"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# A word keeps the space behind it, not the one before it: what is copied is then the same tokens at
# the beginning of an answer or of a JSON string as behind "say " ("and" is left out for `run A and
# run B`). Digits, quotes and backslashes stand alone.
PIECES = r'(?:\p{L}+|\p{N}|["\\]|[^\s\p{L}\p{N}"\\]+)(?: (?!and |\s))?|\n| +|\s'
WEIGHTS = dict(zip(ROWS, (26, 9, 14, 7, 8, 10, 7, 13, 2, 2, 5), strict=False))


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = Words(random.Random(1))
    chat = "<|im_start|>system\n<|im_start|>user\n<|im_start|>assistant\n"
    extra = [chat, " ".join(RUSSIAN), " ".join(EMOJI), HELLO, PRIVET, FALLBACK, THOUGHT] * 40
    schemas = [json.dumps(tools(words, words.rng.sample(TOOLS, 4))) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([words.text, *extra, *schemas], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


class Norm(nn.RMSNorm):
    def __init__(self, size: int, start: float = 1.0):
        super().__init__(size, eps=1e-6)
        nn.init.constant_(self.weight, start)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (
            project(x).view(*x.shape[:2], HEADS, HEAD)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q.float()), self.k_norm(k.float()), v


class Attention(Projections):
    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        same: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in super().forward(x))
        out = F.scaled_dot_product_attention(
            rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype), v, attn_mask=mask
        )
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))


class Mixer(Projections):
    """Mixes each token with the ones just before it: what attention then compares are short runs of
    tokens, not single ones."""

    def __init__(self) -> None:
        super().__init__()
        self.key_conv, self.value_conv = (
            nn.Conv1d(WIDTH, WIDTH, RUN, groups=WIDTH, bias=False) for _ in range(2)
        )

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        same: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = (t.flatten(2) for t in super().forward(x))
        return self.o_proj(
            torch.sigmoid(q * self.run(k, self.key_conv, same)) * self.run(v, self.value_conv, same)
        )

    def run(self, x: torch.Tensor, conv: nn.Conv1d, same: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, RUN - 1, 0))
        return sum(
            padded[:, i : i + x.size(1)] * same[..., i : i + 1] * conv.weight[:, 0, i]
            for i in range(RUN)
        )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "conv_mixer":
            self.local_mixer = self.mix = Mixer()
        else:
            self.self_attn = self.mix = Attention()
        self.mlp = MLP()
        self.input_layernorm, self.pre_feedforward_layernorm = Norm(WIDTH), Norm(WIDTH)
        self.post_attention_layernorm, self.post_feedforward_layernorm = (
            Norm(WIDTH, 0.3),
            Norm(WIDTH, 0.3),
        )

    def forward(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.mix(self.input_layernorm(x), *context))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Model(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(map(Block, KINDS))
        self.norm = Norm(WIDTH)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        at = torch.arange(length)
        angle = at[:, None] * THETA ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.rope = (angle.cos(), angle.sin())
        self.mask = (at[:, None] >= at) & (at[:, None] < at + WINDOW)

    def forward(self, tokens: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Hidden states; nothing passes from one of a row's parts to another, as if each stood
        alone."""
        x, mask = (
            self.embed_tokens(tokens) * WIDTH**0.5,
            self.mask & (parts[:, None, :, None] == parts[:, None, None, :]),
        )
        before = F.pad(parts, (RUN - 1, 0), value=-1).unfold(1, RUN, 1)
        same = (before == parts[..., None]).float()
        for block in self.layers:
            x = block(x, self.rope, same, mask)
        return self.norm(x)


class Stream:
    """Endless training text: tokens, and which of them the model has to answer."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        decoded = (tokenizer.decode([i]) for i in range(len(SPECIAL), VOCABULARY - len(TAGS)))
        self.words = Words(
            random.Random(seed),
            [
                piece
                for piece in decoded
                if piece.isprintable() and "\ufffd" not in piece and piece.strip()
            ],
        )
        self.rng = self.words.rng
        self.easy = 0.0
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.decode = tokenizer.decode
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.header, self.quiet = (
            self.encode("<|im_start|>assistant\n"),
            self.encode("<think>\n\n</think>\n\n"),
        )
        environment = jinja2.Environment()
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = environment.from_string((HERE / "chat_template.jinja").read_text("utf-8"))

    def copies(self) -> tuple[list[int], list[bool]]:
        """The shortest lesson: any tokens at all, to be said again."""
        ids = self.rng.choices(
            range(len(SPECIAL), VOCABULARY - len(TAGS)), k=self.rng.randint(1, 16)
        )
        asked = [
            *self.encode("<|im_start|>user\nsay "),
            *ids,
            self.end,
            *self.encode("\n"),
            *self.header,
        ]
        return [*asked, *ids, self.end], [False] * len(asked) + [True] * (len(ids) + 1)

    def conversation(self) -> tuple[list[int], list[bool]]:
        rng, words = self.rng, self.words
        if rng.random() < self.easy:
            return self.copies()
        thinking = rng.random() > 0.15
        messages: list[dict] = []
        if rng.random() < 0.5:
            messages.append(
                {
                    "role": "system",
                    "content": words.unrelated(
                        rng.choice((rng.randint(10, 200), rng.randint(200, 1200)))
                    ),
                }
            )
        shell = words.shell() if rng.random() < 0.3 else BASH
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            row = rng.choices(ROWS, [WEIGHTS[row] for row in ROWS])[0]
            messages += exchange(row, words, shell)
        if not thinking:
            for message in messages:
                message.pop("reasoning_content", None)
        declared = None
        if shell != BASH:
            declared = own_tools(words, shell, rng.choice((60, 300)))
        elif rng.random() < 0.25:
            declared = tools(words, rng.sample(TOOLS, rng.randint(1, 3)))
        tokens = self.encode(
            self.template.render(messages=messages, tools=declared, enable_thinking=thinking)
        )
        learn = [False] * len(tokens)
        at = 0
        while at < len(tokens):
            if tokens[at : at + len(self.header)] != self.header:
                at += 1
                continue
            at += len(self.header)
            at += len(self.quiet) * (tokens[at : at + len(self.quiet)] == self.quiet)
            end = tokens.index(self.end, at) + 1
            if rng.random() < 0.06:
                begun = self.begun(tokens[at:end])
                tokens[at:end], learn[at:end] = begun
                at += len(begun[0])
                continue
            learn[at:end] = [True] * (end - at)
            at = end
        return tokens, learn

    def begun(self, answer: list[int]) -> tuple[list[int], list[bool]]:
        """The answer as the continuation of its own first words, which end without the space that a
        token has behind a word."""
        spaces = [
            i + 1 for i, token in enumerate(answer[:-1]) if self.decode([token]).endswith(" ")
        ]
        cut = self.rng.choice(spaces) if spaces else 0
        said = self.encode(self.decode(answer[:cut]).rstrip(" "))
        rest = self.encode(" " * bool(cut) + self.decode(answer[cut:-1])) + [self.end]
        return said + rest, [False] * len(said) + [True] * len(rest)

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of conversations: tokens, which of them are answers, and parts of a row that do not
        see each other.

        In half of the rows every conversation stands alone, as a first short request does; in the
        others they follow one another, and of the first only the end is there, since what stands
        far above is cut off."""
        tokens = torch.zeros(rows, length + 1, dtype=torch.long)
        learn = torch.zeros(rows, length + 1, dtype=torch.bool)
        parts = torch.zeros(rows, length + 1, dtype=torch.long)
        for row in range(rows):
            at, alone = 0, self.rng.random() < 0.5
            while at <= length:
                ids, answer = self.conversation()
                if at == 0 and not alone:
                    ids, answer = ids[-length - 1 :], answer[-length - 1 :]
                    if (
                        True in answer and len(ids) > length
                    ):  # the first answer may have lost its request
                        first = answer.index(True)
                        end = next(
                            (i for i in range(first, len(answer)) if not answer[i]), len(answer)
                        )
                        answer[first:end] = [False] * (end - first)
                n = min(len(ids), length + 1 - at)
                tokens[row, at : at + n], learn[row, at : at + n] = (
                    torch.tensor(ids[:n]),
                    torch.tensor(answer[:n]),
                )
                parts[row, at : at + n] = at * alone
                at += n
        return tokens, learn, parts


@torch.no_grad()
def exam(model: Model, stream: Stream) -> float:
    """The share of unseen answers that come out to the character: each token is the likeliest one
    behind those before it."""
    asked = wrong = 0
    for _ in range(4):
        tokens, learn, parts = stream.batch(24, model.mask.size(0))
        answers = learn[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            guess = F.linear(
                model(tokens[:, :-1], parts[:, :-1])[answers], model.embed_tokens.weight
            ).argmax(-1)
        missed = torch.zeros_like(answers).masked_scatter(answers, guess != tokens[:, 1:][answers])
        for answer, miss in zip(answers.tolist(), missed.tolist(), strict=False):
            for i, inside in enumerate(answer):
                if inside and not (i and answer[i - 1]):
                    asked += 1
                    end = answer.index(False, i) if False in answer[i:] else len(answer)
                    wrong += any(miss[i:end])
    return 1 - wrong / asked


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before each step; learns in fewer steps than AdamW
    here."""

    def __init__(self, params: list[nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])
                wide = g.size(0) <= g.size(1)
                x = (g if wide else g.T) / (g.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * 0.01)
                p.add_(
                    x if wide else x.T, alpha=-group["lr"] * max(1, g.size(0) / g.size(1)) ** 0.5
                )


def export(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # The network adds 1 to what the file has as a norm's weight.
    weights = {
        f"model.{name}": (value.detach() - float(name.endswith("norm.weight")))
        .to(torch.float16)
        .contiguous()
        for name, value in model.state_dict().items()
        if ".mix." not in name
    }
    save_file(weights, out / "new.safetensors", {"format": "mlx"})
    os.replace(out / "new.safetensors", out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "model_type": "gear",
        "architectures": ["GearForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": len(KINDS),
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "conv_L_cache": RUN,
        "layer_types": KINDS,
        "rope_theta": THETA,
        "rope_local_base_freq": THETA,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "silu",
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.0}) + "\n"
    )
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if out.resolve() != HERE.resolve():
        (out / "chat_template.jinja").write_text(
            (HERE / "chat_template.jinja").read_text("utf-8"), "utf-8"
        )


def load(model: Model, folder: Path) -> Tokenizer:
    """Gives a model the weights of a folder; returns its tokenizer."""
    weights = {
        name.removeprefix("model."): value.float() + float(name.endswith("norm.weight"))
        for name, value in load_file(folder / "model.safetensors").items()
    }
    model.load_state_dict(weights, strict=False)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def losses(
    model: Model, tokens: torch.Tensor, learn: torch.Tensor, parts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean losses of a batch on answers and on the rest."""
    answers = learn[:, 1:]
    # Always the same number of positions, answers first: every new shape would cost newly compiled
    # kernels.
    order = torch.rand(answers.shape) + answers
    wanted = (
        torch.zeros_like(answers)
        .view(-1)
        .index_fill(0, order.view(-1).topk(answers.numel() * 4 // 15)[1], True)
        .view_as(answers)
    )
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens[:, :-1], parts[:, :-1])[wanted]
        logits = F.linear(hidden, model.embed_tokens.weight)
    each = F.cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")
    return each[answers[wanted]].mean(), each[~answers[wanted]].mean()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--start", type=Path, help="a folder with a trained model to go on from")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument(
        "--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is a fifth of it"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Model(args.length)
    tokenizer = load(model, args.start) if args.start else train_tokenizer()
    stream, trial = Stream(tokenizer, args.seed), Stream(tokenizer, args.seed + 1000)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=args.rate),
        torch.optim.AdamW(others, lr=args.rate / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, step, exported, average = time.monotonic(), 0, 0.0, 0.0
    while (passed := (time.monotonic() - start) / 60) < args.minutes:
        stream.easy = max(0.1, 1 - passed / args.minutes * 15) if not args.start else 0.1
        for group, rate in groups:
            cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (passed / args.minutes - 0.2) / 0.8)))
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        answered, rest = losses(model, *stream.batch(args.rows, args.length))
        (answered + 0.02 * rest).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        average = 0.98 * average + 0.02 * answered.item() if step > 1 else answered.item()
        if step % 100 == 0:
            exact = exam(model, trial)
            told = f"step {step}, {passed:.1f} minutes, loss {average:.4f}, exact {exact:.1%}"
            print(told, flush=True)
        if passed > exported + 4:
            exported = passed
            export(model, tokenizer, args.out)
    export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
