"""`pull` without a name: which models a machine is offered, by a listing as the hub gives it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Server
from fake_hub import FakeHub

from _mlx_server.inference.catalog.choices import Choice, offer
from _mlx_server.inference.catalog.hub import Hub

GB = 2**30
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
DEMO = {path.name: path.read_bytes() for path in (ROOT / "tests" / "demo").glob("*.*")}
# Repo, billions of parameters, bits, downloads, month, model type, window, and what is unusual
LISTING = [
    ("Llama-3.2-3B-Instruct-4bit", 3.2, 4, 900_000, "2024-09", "llama", 131072, ""),
    ("Qwen3-0.6B-4bit", 0.6, 4, 800_000, "2026-04", "qwen3", 40960, ""),
    ("gpt-oss-20b-MXFP4-Q8", 20.9, 4.6, 600_000, "2026-01", "gpt_oss", 131072, ""),
    ("whisper-large-v3-turbo", 0.8, 16, 500_000, "2026-02", "whisper", 448, "deaf"),
    ("Qwen3.5-9B-4bit", 9, 4, 400_000, "2026-05", "qwen3_5", 262144, "sees"),
    ("Qwen3.5-9B-8bit", 9, 8, 90_000, "2026-05", "qwen3_5", 262144, "sees"),
    ("Qwen3.5-4B-4bit", 4, 4, 300_000, "2026-05", "qwen3_5", 262144, "sees"),
    ("Qwen3-30B-A3B-Instruct-2507-4bit", 30.5, 4, 250_000, "2026-02", "qwen3_moe", 262144, ""),
    ("Qwen3-30B-A3B-Instruct-2507-8bit", 30.5, 8, 50_000, "2026-02", "qwen3_moe", 262144, ""),
    ("Devstral-Small-2-24B-Instruct-4bit", 24, 4, 200_000, "2026-03", "mistral3", 393216, "sees"),
    ("Phi-9-14B-4bit", 14, 4, 190_000, "2026-06", "phi9_unknown", 131072, ""),
    ("Tiny-Window-13B-4bit", 13, 4, 180_000, "2026-06", "llama", 8192, ""),
    ("Qwen3-Next-80B-A3B-Instruct-4bit", 80, 4, 150_000, "2026-01", "qwen3_next", 262144, ""),
    ("gpt-oss-120b-MXFP4-Q8", 117, 4.35, 140_000, "2026-01", "gpt_oss", 131072, ""),
    ("Story-Writer-70B-4bit", 70, 4, 130_000, "2026-06", "llama", 131072, "deaf"),
    ("Qwen3.5-27B-4bit", 27, 4, 120_000, "2026-05", "qwen3_5", 262144, "sees"),
    ("Qwen3-8B-4bit", 8.2, 4, 110_000, "2026-01", "qwen3", 131072, ""),
    ("DeepSeek-V3.2-4bit", 671, 4, 100_000, "2026-03", "deepseek_v32", 163840, ""),
]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    repos, listed = {}, {}
    for name, size, bits, downloads, month, kind, window, odd in LISTING:
        repo, config = f"mlx-community/{name}", {"max_position_embeddings": window}
        config = {"text_config": config} if odd == "sees" else config
        repos[repo] = {**DEMO, "config.json": json.dumps(config).encode()}
        template = "" if odd == "deaf" else TOOLS
        listed[repo] = {
            "config": {"model_type": kind, "tokenizer_config": {"chat_template": template}},
            "createdAt": f"{month}-15T12:00:00.000Z",
            "downloads": downloads,
            "pipeline_tag": "image-text-to-text" if odd == "sees" else "text-generation",
            "safetensors": {"parameters": {"U32": int(size * 1e9 * bits / 32)}, "total": 1},
        }
    hub = FakeHub(repos)
    hub.listed = listed
    # One that can be pulled and served
    hub.repos["mlx-community/Qwen3.5-9B-4bit"] = DEMO
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def offered(hub: FakeHub, memory: float, tmp_path: Path) -> list[Choice]:
    """What a machine is offered whose GPU may use so many gigabytes."""
    from huggingface_hub import HfApi

    asked = Hub(tmp_path)
    asked.__dict__["api"] = HfApi(endpoint=hub.url)
    return offer(asked, int(memory * GB))


@pytest.mark.parametrize(
    "memory, usable, first, others",
    [
        (16, 10.7, "Qwen3.5-9B-4bit", {"Qwen3.5-4B-4bit"}),
        (32, 21.3, "Qwen3.5-27B-4bit", {"gpt-oss-20b-MXFP4-Q8"}),
        (64, 48, "Qwen3-30B-A3B-Instruct-2507-4bit", {"Qwen3.5-27B-4bit"}),
        (128, 96, "Qwen3-Next-80B-A3B-Instruct-4bit", {"Qwen3.5-27B-4bit"}),
    ],
)
def test_what_is_offered_fits(
    hub: FakeHub, tmp_path: Path, memory: int, usable: float, first: str, others: set[str]
):
    choices = offered(hub, usable, tmp_path)
    names = [choice.candidate.repo.partition("/")[2] for choice in choices]
    assert names[0] == first and others <= set(names) and len(set(names)) == len(names)
    assert all(choice.candidate.size <= usable * GB * 0.6 for choice in choices)
    assert all(choice.context_length >= 64_000 and choice.why for choice in choices)
    wrong = "Llama|0.6B|whisper|Phi-9|Tiny-Window|Story|DeepSeek"
    assert not [name for name in names if re.match(wrong, name)]
    assert not list(tmp_path.iterdir())  # nothing of it has come into the cache


@pytest.mark.slow
def test_a_key_takes_one_and_a_server_with_the_demo_alone_takes_it_as_default(
    hub: FakeHub, tmp_path: Path
):
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
    assert re.search(r"1 +mlx-community/Qwen3\.5-9B-4bit +4\.2 GB +131,072 +yes +the largest", out)
    assert f"the server at {server.url} takes it as its default model from now on" in out
    assert server.stop() == 0
    os.close(screen), os.close(keyboard)
