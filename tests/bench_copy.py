"""How many tokens a pass brings where answers copy from what was read.

The answers are not a model's: a scripted sampler replays them through the real engine, with a
tokenizer of 32,000 entries that is trained on the standard library. They are such as agents get:
files of the standard library that were read with numbered lines, and edits of them."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bench_parts import progress
from bench_prompts import LIBRARY
from models import CHATML, CONFIGS, build_model

from _mlx_server.inference.speculation.pass_costs import PassCosts
from _mlx_server.inference.speculation.speculation import Drafter
from engine import Engine, Usage

VOCABULARY = 32000
KINDS = ("quoted code", "one Edit", "three Edits", "Write of a known file", "fresh code", "prose")
# What passes cost by the tokens they read, as others have measured it for 4-bit weights:
# https://github.com/ml-explore/mlx/issues/3839 (dense, M4 Pro), an M2 Pro with a dense model of 4B,
# and a model with experts, which cost by the token.
TABLES = {
    "M3 or later": {1: 1.0, 2: 1.03, 4: 1.5, 8: 2.7, 16: 4.5, 32: 4.5},
    "M1, M2": {1: 1.0, 2: 1.69, 4: 3.1, 8: 5.9, 32: 6.2},
    "experts": {1: 1.0, 2: 1.26, 4: 1.78, 8: 2.82, 16: 4.9, 32: 9.06},
}
XML = CHATML.replace(
    """
{"name": "{{ tool_call.function.name }}", "arguments": {{ tool_call.function.arguments | tojson }}}
""",
    """
<function={{ tool_call.function.name }}>
{% for key, value in tool_call.function.arguments | items %}<parameter={{ key }}>
{{ value }}
</parameter>
{% endfor %}</function>
""",
).replace('{"name": ..., "arguments": ...}', "<function=N>\n<parameter=K>\nV\n</parameter>")
TEMPLATES = {"JSON": CHATML, "XML": XML}
SMALL = {
    **CONFIGS["qwen2"],
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name}s a file.",
            "parameters": {
                "type": "object",
                "properties": {field: {"type": "string"} for field in ("file_path", *fields)},
            },
        },
    }
    for name, fields in (
        ("Read", ()),
        ("Edit", ("old_string", "new_string")),
        ("Write", ("content",)),
    )
]


class FixedCosts(PassCosts):
    """Costs that real passes do not correct."""

    def note(self, rows: int, context: int, seconds: float) -> None:
        pass


@dataclass
class Case:
    """A conversation, and the answer to it."""

    kind: str
    messages: list[dict[str, Any]]
    answer: str


def cases(seed: int, syntax: str) -> Iterator[Case]:
    """One case of each kind, the same in both syntaxes."""
    rng = random.Random(seed)
    files = library()
    names = rng.sample(sorted(files), 6)
    known, other, fresh, prose = (files[name] for name in names[:4])
    messages = conversation(rng, {f"/src/{names[1]}": other, f"/src/{names[0]}": known})
    path = f"/src/{names[0]}"
    at = rng.randrange(20, len(known) - 60)
    block = "\n".join(known[at : at + 40])
    quoted = f"The part that matters is this:\n\n```python\n{block}\n```\n\nIt runs once a call."
    edits = [edit(rng, known) for _ in range(3)]
    for kind, answer in (
        ("quoted code", quoted),
        ("one Edit", call(syntax, "Edit", file_path=path, **edits[0])),
        (
            "three Edits",
            "\n".join(call(syntax, "Edit", file_path=path, **one) for one in edits),
        ),
        (
            "Write of a known file",
            call(syntax, "Write", file_path=path, content="\n".join(changed(rng, known, 4))),
        ),
        ("fresh code", "```python\n" + "\n".join(fresh[:80]) + "\n```"),
        ("prose", docstrings(prose)),
    ):
        yield Case(kind, messages, answer)


def library() -> dict[str, list[str]]:
    """The first 150 lines behind the head of files of the standard library, by their names."""
    files = {}
    for path in sorted(LIBRARY.glob("*.py")):
        lines = path.read_text("utf-8").split("\n")
        if len(lines) > 300:
            files[path.name] = lines[60:210]
    return files


def docstrings(lines: Sequence[str]) -> str:
    """A text that stands nowhere else: the words of some lines, in sentences."""
    words = [word for line in lines for word in line.split() if word.isalpha()]
    return " ".join(words[:200]) + "."


def conversation(rng: random.Random, files: dict[str, list[str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are an agent that edits files."},
        {"role": "user", "content": "Look at these files and change what I asked for."},
    ]
    for name, lines in files.items():
        function = {"name": "Read", "arguments": {"file_path": name}}
        one = {"id": f"call_{rng.randrange(10**9)}", "type": "function", "function": function}
        shown = "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, 1))
        messages.append({"role": "assistant", "content": "", "tool_calls": [one]})
        result = {"role": "tool", "tool_call_id": one["id"], "name": "Read", "content": shown}
        messages.append(result)
    return messages


def edit(rng: random.Random, lines: Sequence[str]) -> dict[str, str]:
    """An edit of some lines, of which one or two change."""
    size = rng.randrange(6, 16)
    at = rng.randrange(len(lines) - size)
    old = list(lines[at : at + size])
    return {"old_string": "\n".join(old), "new_string": "\n".join(changed(rng, old, 2))}


def changed(rng: random.Random, lines: Sequence[str], count: int) -> list[str]:
    """The lines with so many changes: a word for another, or a line more."""
    new = list(lines)
    for _ in range(count):
        at = rng.randrange(len(new))
        words = [word for word in new[at].split() if word.isidentifier()]
        if words and rng.random() < 0.6:
            new[at] = new[at].replace(rng.choice(words), f"{rng.choice(words)}_{rng.choice('xyz')}")
        else:
            blanks = new[at][: len(new[at]) - len(new[at].lstrip())]
            new.insert(at, f"{blanks}check_{rng.randrange(100)}(value, strict=True)")
    return new


def call(syntax: str, name: str, **arguments: str) -> str:
    """A tool call as a model writes it."""
    if syntax == "JSON":
        text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{text}\n</tool_call>"
    values = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def copy(args: argparse.Namespace) -> None:
    """Prints tokens a pass for each kind of answer, and the speed that follows from what passes
    cost on other machines, as a multiple of that without speculation."""
    print(
        "Answers are replayed through the engine by a scripted sampler, no model has made them.\n"
        "Tokens a pass (estimated speed, as a multiple of the speed without speculation);\n"
        f"means of {args.seeds} seeds. What passes cost is what others have measured."
    )
    print(f"{'':12} {'':4}", *(f"{kind:>22}" for kind in KINDS))
    with tempfile.TemporaryDirectory() as folder:
        for syntax, template in TEMPLATES.items():
            path = Path(folder) / syntax
            build_bench_model(path, Path(folder) / "tokenizer.json", template)
            with Engine(str(path)) as engine:
                for table, costs in TABLES.items():
                    row = measure(engine, FixedCosts(costs), syntax, args.seeds)
                    told = (f"{tokens:.2f} ({speed:.2f})" for tokens, speed in row)
                    print(f"{table:12} {syntax:4}", *(f"{one:>22}" for one in told), flush=True)


def measure(
    engine: Engine, costs: FixedCosts, syntax: str, seeds: int
) -> Iterator[tuple[float, float]]:
    """Tokens a pass and the estimated speed for each kind of answer, means over the seeds."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for seed in range(1, seeds + 1):
        for case in cases(seed, syntax):
            progress(f"{case.kind}, {syntax}, seed {seed}")
            found[case.kind].append(replay(engine, costs, case))
    for values in found.values():
        yield tuple(map(statistics.mean, zip(*values, strict=True)))


class Script:
    """A sampler that picks the tokens of a text, whatever is likely."""

    def __init__(self, tokens: list[int]):
        self._tokens, self.place = [*tokens, 0], 0

    def __call__(self, logprobs: Any) -> Any:
        self.place += 1
        return self.pick(logprobs, self.place - 1)

    def pick(self, logprobs: Any, place: int) -> Any:
        import mlx.core as mx

        places = range(place, place + logprobs.shape[0])
        return mx.array([self._tokens[min(at, len(self._tokens) - 1)] for at in places], mx.uint32)


def replay(engine: Engine, costs: FixedCosts, case: Case) -> tuple[float, float]:
    """Tokens a pass of an answer, and the tokens that come in the time of one pass without a
    draft."""
    assert engine.default is not None
    renderer = engine.renderer(engine.default)
    script = Script([*renderer.encode(case.answer), *renderer.tokenizer.eos_token_ids])
    list(engine.chat("", max_tokens=0))
    speculation = engine.pool.runners[engine.default.name].speculation
    assert speculation is not None
    speculation.costs, step, spent = costs, speculation.step, []

    def count(row: Any, drafters: Sequence[Drafter]) -> list[Any]:
        before, context = drafters[0].drafted, len(row.tokens[0])
        responses = step(row, drafters)
        spent.append(costs.cost(1 + drafters[0].drafted - before, context))
        return responses

    make = mock.patch("_mlx_server.inference.decoding.runner.make_sampler", lambda *_: script)
    with make, mock.patch.object(speculation, "step", count):
        generation = engine.chat(case.messages, tools=TOOLS)
        list(generation)
    usage: Usage = generation.usage
    return usage.completion_tokens / usage.decode_passes, usage.completion_tokens / sum(spent)


def build_bench_model(path: Path, tokenizer: Path, template: str) -> None:
    """Writes a small model of random weights with the tokenizer, which is trained if need be."""
    config = {**SMALL, "vocab_size": VOCABULARY}
    build_model("qwen2", path, template=template, config=config)
    if not tokenizer.exists():
        progress("training a tokenizer")
        train_tokenizer(tokenizer)
    (path / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def train_tokenizer(path: Path) -> None:
    """Writes a byte-level BPE tokenizer of the standard library's code, with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.read_text("utf-8", "replace") for file in sorted(LIBRARY.rglob("*.py"))[::12]]
    tokenizer.train_from_iterator([*texts, *map(json.dumps, texts[::4])], trainer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save(str(path))
