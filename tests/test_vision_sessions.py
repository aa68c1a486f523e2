"""Images beside what else a request can have: other requests, formats, a small cache, a client."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT
from phases import Phases
from PIL import Image
from test_clients import ClaudeSession
from test_concurrent import runtime
from test_http import ask
from test_vision import FILES, answer, conversation, finish, reference
from vision_models import PICTURES, build_vision_model, png

from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.images.images import read_pixels
from _mlx_server.inference.sequence import State
from engine import Engine, InvalidRequest, Priority, Request, Sampling

NO_TAGS = Sampling(temperature=0.0, logit_bias=dict.fromkeys(range(508, 512), -100.0))


class Forcing(Engine):
    """Answers the user's words with a call of Read for a `file`, and all else with one word."""

    file = ""

    def submit(self, request: Request, *more):
        schema = {
            "type": "object",
            "properties": {"file_path": {"type": "string", "enum": [self.file]}},
            "required": ["file_path"],
            "additionalProperties": False,
        }
        function = {"name": "Read", "parameters": schema}
        request.tools = [{"type": "function", "function": function}]
        if request.messages[-1]["content"].endswith("look at it"):
            request.tool_choice = "Read"
        else:
            request.format, request.sampling = {"enum": ["seen"]}, NO_TAGS
        request.max_tokens = 1000
        return super().submit(request, *more)


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3"])
def test_claude_code_reads_an_image(kind: str, tmp_path: Path, serve):
    """The tower looks at it once in the whole session."""
    cli = os.environ.get("CLAUDE_CLI")
    if not cli:
        pytest.skip("CLAUDE_CLI does not name Claude Code's program; .ci/run does")
    home, model = tmp_path / "home", build_vision_model(kind, tmp_path / kind)
    home.mkdir()
    (home / "screen.png").write_bytes(png(PICTURES[1]))
    with Forcing(str(model)) as engine:
        engine.file = str(home / "screen.png")
        server = serve(engine)
        program = [sys.executable, str(ROOT / "mlx_server.py"), "--port", str(server.port)]
        printed = subprocess.run([*program, "--print-env"], capture_output=True, text=True)
        flags = ["--tools", "Read", "--allowedTools", "Read", "--system-prompt", "Be brief."]
        session = ClaudeSession(cli, home, printed.stdout, *flags)
        for text in ("look at it", "go on", "and on"):
            assert session.say(text).strip() == '"seen"'
        session.close()
        metrics = ask(server, "GET", "/metrics")[1]
    results = [
        block
        for one in session.seen
        if one["type"] == "user" and isinstance(one["message"]["content"], list)
        for block in one["message"]["content"]
        if block["type"] == "tool_result"
    ]
    assert results  # an agent may well read it again
    for result in results:
        assert [block["type"] for block in result["content"]] == ["image"]
    assert re.search(r"^mlx_server_images_read_total 1$", str(metrics, "utf-8"), re.MULTILINE)


# Other requests


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_vision_model("qwen3_vl", tmp_path_factory.mktemp("seeing")))


@pytest.mark.slow
@pytest.mark.parametrize("phase", [State.PREFILL, State.DECODE])
def test_a_request_with_images_makes_room_and_goes_on(
    seeing: str, phase: State, monkeypatch: pytest.MonkeyPatch, phases: Phases
):
    monkeypatch.setattr(PromptReader, "CHUNK", 16)
    shown = {"max_tokens": 24, "priority": Priority.LOW}
    held = phases.hold(State.DECODE)
    with Engine(seeing) as engine:
        low = engine.submit(conversation(*FILES, **shown))
        with held:
            runner = runtime(engine)
            room = runner.size + runner.reserve(low.sequence)
    with Engine(seeing, memory=room) as engine:
        answer(engine, Request("default", [{"role": "user", "content": "hi"}], max_tokens=1))
        held = phases.hold(phase)
        low = engine.submit(conversation(*FILES, **shown))
        with held:
            high = engine.chat("now", max_tokens=2, priority=Priority.HIGH)
        assert finish(high).usage.completion_tokens == 2
        done = finish(low)
        assert phases.when(high, State.ENDED) < phases.when(low, State.ENDED)
        expected = reference("qwen3_vl")["answer"].tolist()
        assert done.tokens[low.prompt_tokens :] == expected
        assert low.usage.images_read <= 4


@pytest.mark.slow
def test_formats_and_calls_beside_images(seeing: str):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    function = {"name": "tell", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    with Engine(seeing) as engine:
        colors = [{"color": "red"}, {"color": "green"}]
        for _ in range(2):  # cold, and from the cache
            asked = engine.submit(conversation(*FILES, format=schema, max_tokens=200))
            assert json.loads("".join(asked.text())) in colors
        asked = engine.submit(
            conversation(
                *FILES, tools=tools, tool_choice="tell", parallel_tool_calls=False, max_tokens=200
            )
        )
        finish(asked)
        [(_, name, arguments)] = asked.sequence.calls
        assert name == "tell" and arguments in colors
        plain = [engine.submit(conversation(*FILES)), engine.submit(conversation(FILES[0]))]
        held = engine.submit(conversation(*FILES, format=schema, max_tokens=200))
        assert json.loads("".join(held.text())) in colors
        done = finish(plain[0])
        assert done.tokens[plain[0].prompt_tokens :] == reference("qwen3_vl")["answer"].tolist()
        finish(plain[1])


@pytest.mark.slow
def test_a_quantised_cache_beside_other_requests_and_after_a_restart(seeing: str, tmp_path: Path):
    with Engine(seeing, kv_bits=8, cache_dir=tmp_path) as engine:
        alone = answer(engine, conversation(*FILES))
        others = [engine.chat(f"Count to {n}.", max_tokens=60) for n in (10, 100)]
        assert answer(engine, conversation(*FILES)) == alone
        for other in others:
            finish(other)
    with Engine(seeing, kv_bits=8, cache_dir=tmp_path) as engine:
        again = engine.submit(conversation(*FILES))
        assert finish(again).tokens[again.prompt_tokens :] == alone
        assert again.usage.images_read == 0 and again.cached_tokens > 100


# Memory

PEAK = """
import io, sys
from PIL import Image
from _mlx_server.inference.images.images import read_pixels

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

def read(content):
    return read_pixels(content, lambda width, height: (1504, 832), 3)

small = io.BytesIO()
Image.new("RGBA", (9, 9)).save(small, sys.argv[2])
read(small.getvalue())
content = open(sys.argv[1], "rb").read()
before = peak()
assert read(content).shape == (832, 1504, 3)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_large_image_is_read_in_little_memory(form: str, tmp_path: Path):
    file = tmp_path / "image"
    size = (3900, 2179) if form == "WEBP" else (7900, 4050)  # just below the limits
    Image.new("RGBA", size, (1, 2, 3, 4)).save(file, form)
    command = [sys.executable, "-c", PEAK, str(file), form]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert out.returncode == 0 and float(out.stdout) < 150, out.stdout + out.stderr


@pytest.mark.parametrize("size", [(150, 83), (640, 80), (70, 400)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_image_that_is_read_in_tiles_is_that_of_a_whole(
    mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("_mlx_server.inference.images.images.TILE", 64)
    noise = np.random.RandomState(3).randint(0, 256, (205, 310, len(mode)), dtype=np.uint8)
    image, file = Image.fromarray(noise, mode), io.BytesIO()
    image.save(file, "PNG")
    if mode == "RGBA":
        image = Image.alpha_composite(Image.new(mode, image.size, "white"), image).convert("RGB")
    expected = np.asarray(image.resize(size, 3)).astype(int)
    assert np.abs(read_pixels(file.getvalue(), lambda *_: size, 3) - expected).max() <= 1


def test_a_large_webp_is_refused():
    """Pillow would take 16 bytes for each of its pixels."""
    file = io.BytesIO()
    Image.new("1", (4000, 2200)).save(file, "WEBP", method=0)
    with pytest.raises(InvalidRequest, match="4000 x 2200 pixels, where 8.5 million are allowed"):
        read_pixels(file.getvalue(), lambda *size: size, 3)
