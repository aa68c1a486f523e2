"""`pull` without a name: which models a machine is offered, by a listing as the hub gives it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_listing
import pytest
from conftest import PATIENCE, ROOT, Server
from fake_hub import FakeHub, serving

from _mlx_server.inference.catalog.choices import Choice, offer
from _mlx_server.inference.catalog.hub import Hub

GB = 2**30
DEMO = {path.name: path.read_bytes() for path in (ROOT / "tests" / "demo").glob("*.*")}
README = (ROOT / "README.md").read_text("utf-8")
NINE = "mlx-community/Qwen3.5-9B-MLX-4bit"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serving(hub_listing.files()) as hub:
        hub.listed = hub_listing.listed()
        hub.sizes = {f"mlx-community/{row[0]}": hub_listing.size(row) for row in hub_listing.MODELS}
        yield hub


def offered(hub: FakeHub, memory: float, tmp_path: Path) -> list[Choice]:
    """What a machine is offered whose GPU may use so many gigabytes."""
    from huggingface_hub import HfApi

    asked = Hub(tmp_path)
    asked.__dict__["api"] = HfApi(endpoint=hub.url)
    return offer(asked, int(memory * GB))


def short(choices: list[Choice]) -> list[str]:
    return [choice.repo.removeprefix("mlx-community/") for choice in choices]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("memory, usable", [(16, 10.7), (32, 21.3), (64, 48), (128, 96)])
def test_what_is_offered_fits(
    hub: FakeHub, tmp_path: Path, memory: int, usable: float, packed: bool
):
    """However the hub counts weights in packed integers. The README names what is offered."""
    hub.listed = hub_listing.listed(packed)
    choices = offered(hub, usable, tmp_path)
    names = short(choices)
    assert len(choices) == 3 and len({*names}) == len(names)
    assert all(0 < choice.size - hub.sizes[choice.repo] < 10_000 for choice in choices)
    assert all(choice.size <= usable * GB * 0.75 for choice in choices)
    assert all(choice.context_length >= 64_000 and choice.why for choice in choices)
    unfit = "MTP|lora|assistant|Embedding|Base|ASR|TTS|whisper|parakeet|Kokoro|bge|GGUF|bf16|3bit"
    unfit += "|diffusion|LFM|GLM-4.6V|Phi-9|Story|Llama|Qwen3-8B|Mistral|gpt-oss|gemma-3-"
    assert not [name for name in names if re.search(unfit, name)]
    assert not list(tmp_path.iterdir())  # nothing of it has come into the cache
    (row,) = re.findall(rf"^\| {memory} GB \| .* \| (.*) \|$", README, re.M)
    assert row.split(", ") == names


def test_it_is_said_why(hub: FakeHub, tmp_path: Path):
    said = {choice.why.partition(":")[0]: choice for choice in offered(hub, 96, tmp_path)}
    assert "3 of 35 billion parameters work at a time" in said["quick"].why
    assert "all 27 billion parameters work" in said["thorough and slower"].why
    assert said["thorough and slower"].sees and said["thorough and slower"].context_length == 262144


def test_a_model_whose_sessions_are_too_large_is_not_offered(hub: FakeHub, tmp_path: Path):
    """Its weights would fit."""
    assert hub.sizes["mlx-community/granite-4.2-30b-4bit"] < 17 * GB
    choices = offered(hub, 24, tmp_path)
    assert choices and not [name for name in short(choices) if "granite" in name]


def test_what_cannot_be_read_is_passed_over(hub: FakeHub, tmp_path: Path):
    before = hub.repos
    try:
        first = offered(hub, 21.3, tmp_path)[0].repo
        hub.repos = {**before, first: {**before[first], "config.json": b"[]"}}
        assert first not in [choice.repo for choice in offered(hub, 21.3, tmp_path)] != []
    finally:
        hub.repos = before


@pytest.mark.slow
def test_a_key_takes_one_and_a_server_with_the_demo_alone_takes_it_as_default(
    hub: FakeHub, tmp_path: Path
):
    hub.repos[NINE] = DEMO  # one that can be pulled and served
    del hub.sizes[NINE]
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    server = Server(env=env)
    screen, keyboard = pty.openpty()
    flags = ["--port", str(server.port), "--memory", "10.7GB"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "mlx_server.py"), "pull", *flags],
        stdin=keyboard,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    out = ""
    while not out.endswith("any other key for none: "):
        assert (piece := process.stdout.read(1)), process.stderr.read()
        out += piece
    os.write(screen, b"1")
    rest, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + rest + err
    out += rest
    assert re.search(rf"1 +{NINE} +5 MB +131,072 +yes +no +the largest", out)
    assert f"the server at {server.url} takes it as its default model from now on" in out
    assert server.stop() == 0
    os.close(screen), os.close(keyboard)
