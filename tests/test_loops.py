"""Long tool loops with the templates of many families: only what is new is prefilled, whatever the
client makes of the model's thinking. `CHAT_TEMPLATES` may name a JSON file with more of them, an
object of templates by names."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import call_families
import pytest
import test_append_only as append_only
import test_text_is_text as shapes
from conftest import ROOT
from models import build_tokenizer
from tokenizers import Tokenizer

from _mlx_server.inference.cache.prefix_tree import common_prefix
from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.output.parser import OutputParser
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.wire.anthropic import AnthropicMessages
from engine import Done, Text, Thinking, ToolEnd, ToolStart, Usage

WORDS = re.findall(r"[A-Za-z]+", ROOT.joinpath("ARCHITECTURE.md").read_text("utf-8"))
CLIENTS = ("nothing", "inputs", "thinking omitted", "thinking dropped")
TURNS, CALLS = 3, 8

# Of each shape: how its model writes calls, the tokens that end an answer
ENDS = {
    "llama 3": ("llama", ["<|eot_id|>", "<|eom_id|>"]),
    "mistral": ("mistral", ["</s>"]),
    "gemma": ("hermes", ["<end_of_turn>"]),
    "phi": ("phi 4", ["<|end|>"]),
    "deepseek": ("deepseek v3.1", ["<｜end▁of▁sentence｜>"]),
    "glm": ("glm", ["<|user|>", "<|observation|>"]),
    "gpt-oss": ("harmony", ["<|return|>", "<|call|>"]),
    "xml": ("qwen coder", ["<|im_end|>"]),
}
CALLS_BY_TAG = {
    "<function=": "qwen coder",
    "<tool_call>": "hermes",
    "<|python_start|>": "llama 4",
    "<|python_tag|>": "llama",
    "<|tool_call|>": "granite",
}
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "</s>")
TEMPLATES = {name: (text, "") for name, text in append_only.FAMILIES.items()} | shapes.FAMILIES
if more := os.environ.get("CHAT_TEMPLATES"):
    for name, text in json.loads(Path(more).read_text("utf-8")).items():
        tokens = re.findall(r"<\|[\w ]+\|>|</?s>|</?think>|</?tool_response>", text)
        TEMPLATES[name] = (text, " ".join(dict.fromkeys(tokens)))
        call = next(call for tag, call in CALLS_BY_TAG.items() if tag in text)
        ENDS[name] = (call, [end for end in TURN_ENDS if end in text][:1] or ["<|im_end|>"])


class Loop:
    """A model whose answers are given, and a client that calls its tools."""

    def __init__(self, path: Path, name: str, template: str, marks: list[str]):
        call, ends = ENDS.get(name, ("hermes", ["<|im_end|>"]))
        build_tokenizer(path, template, list(dict.fromkeys(marks + ends)))
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        config = {"model_type": "qwen2", "eos_token_id": list(map(tokenizer.token_to_id, ends))}
        (path / "config.json").write_text(json.dumps(config))
        shutil.copy(ROOT / "tests/demo/model.safetensors", path)
        self.local, self.ends = describe("m", path), ends
        if not PromptRenderer(self.local).template.traits.has_tools:
            call = "hermes"
        _, self.begin, self.call, _, self.end = call_families.FAMILIES[call]
        self.harmony = call == "harmony"

    def write(self, in_thinking: bool, thought: str, said: str, command: str) -> str:
        """An answer as the family writes it, up to its end token."""
        called = self.begin + self.call("Bash", {"command": command}) + self.end if command else ""
        if self.harmony:
            again = "<|end|><|start|>assistant"
            written = f"<|channel|>analysis<|message|>{thought}{again}" if thought else ""
            if not command:
                return f"{written}<|channel|>final<|message|>{said}<|return|>"
            if said:
                written += f"<|channel|>commentary<|message|>{said}{again}"
            return written + called
        tags = self.renderer.format.thinking
        written = ""
        if tags and (thought or in_thinking):
            written = f"{'' if in_thinking else tags[0]}\n{thought}\n{tags[1]}\n\n"
        return (
            written + said + ("\n" if said and called else "") + called + self.ends[-bool(called)]
        )

    def run(self, client: str, thinking: bool) -> tuple[int, int]:
        """The tokens that are prefilled behind the first prompt, and those that are new."""
        self.renderer = PromptRenderer(self.local)
        chance = random.Random(f"{client} {thinking}")
        messages: list[dict] = []
        known: list[list[int]] = []
        prefilled = new = 0
        for turn, step in itertools.product(range(TURNS), range(CALLS + 1)):
            if not step:
                messages.append(append_only.user(some(chance, 40)))
            body = append_only.body(messages, turn)
            reply = AnthropicMessages(body if thinking else {**body, "thinking": OFF})
            request = reply.request
            prompt = self.renderer.prompt(request)
            if known:
                prefilled += len(prompt.tokens) - max(
                    common_prefix(before, prompt.tokens) for before in known
                )
                new += len(prompt.tokens) - len(known[-1])
            written = self.write(
                prompt.in_thinking,
                some(chance, 30) if thinking else "",
                some(chance, 8) if step in (0, 3, CALLS) else "",
                some(chance, 5) if step < CALLS else "",
            )
            everything = prompt.tokens + self.renderer.encode(written)
            known.append(everything)
            content = self.answer(reply, prompt, written, everything)
            back = append_only.REWRITES[client](content)
            messages.append({"role": "assistant", "content": back})
            calls = [block["id"] for block in content if block["type"] == "tool_use"]
            assert len(calls) == (step < CALLS), written
            if calls:
                messages.append(append_only.results((calls[0], some(chance, 60))))
        return prefilled, new

    def answer(self, reply: Any, prompt: Any, written: str, everything: list[int]) -> list[dict]:
        """What the client gets of an answer, which is remembered as the engine does it."""
        for end in self.ends:
            written = written.removesuffix(end)
        request, format = reply.request, self.renderer.format
        parser = OutputParser(format, request.tools, in_thinking=prompt.in_thinking)
        events = [*parser.feed(written), *parser.finish()]
        ends = (event for event in events if isinstance(event, ToolEnd))
        starts = (event for event in events if isinstance(event, ToolStart))
        self.renderer.remember(
            request,
            prompt,
            everything,
            "".join(event.text for event in events if isinstance(event, Text)),
            "".join(event.text for event in events if isinstance(event, Thinking)),
            [(one.id, one.name, end.arguments) for one, end in zip(starts, ends, strict=True)],
        )
        reply.open(SimpleNamespace(id="1", prompt_tokens=0, cached_tokens=0))
        for event in [*events, Done("tool_calls" if parser.called else "stop", Usage())]:
            reply.event(event)
        return reply.whole()["content"]


OFF = {"type": "disabled"}


def some(chance: random.Random, count: int) -> str:
    """So many words."""
    at = chance.randrange(len(WORDS) - count)
    return " ".join(WORDS[at : at + count])


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_loop_prefills_only_what_is_new(tmp_path: Path, name: str):
    template, marks = TEMPLATES[name]
    loop = Loop(tmp_path, name, template, marks.split())
    for client, thinking in itertools.product(CLIENTS, (True, False)):
        prefilled, new = loop.run(client, thinking)
        print(f"{name}, {client}, thinking {thinking}: {prefilled} / {new} = {prefilled / new:.3f}")
        assert prefilled <= 1.05 * new, (client, thinking)
