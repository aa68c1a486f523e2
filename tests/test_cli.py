"""The program as a user starts and stops it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, Server
from models import build_model


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "mlx_server.py"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )


def ask(server: Server, path: str, body: dict) -> dict:
    with urllib.request.urlopen(
        f"{server.url}{path}", json.dumps(body).encode(), timeout=60
    ) as response:
        return json.load(response)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--port", "http"], "not a port"),
        (["--alias", "nonsense"], "PATTERN=NAME"),
        (["--context", "0"], "positive"),
        (["--frobnicate"], "frobnicate"),
        (["--port", "0", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--port", "0", "--model", "no-such-model:7b"], "not found"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
    ],
)
def test_mistakes_are_told_in_a_line(flags: list[str], said: str):
    result = run(*flags)
    assert result.returncode != 0
    assert said in result.stderr and "Traceback" not in result.stderr


def test_version():
    assert run("--version").stdout.startswith("mlx-server 0.")


# In the server's process no model is loaded while the file $HOLD is there
HELD_LOADING = """
import os, time
from _mlx_server.inference.group import Group

load = Group.load

def held_load(self, *args, **options):
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(0.01)
    return load(self, *args, **options)

Group.load = held_load
"""


@pytest.mark.slow
def test_the_socket_listens_long_before_the_model_is_there(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(HELD_LOADING)
    (tmp_path / "hold").touch()
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOLD": str(tmp_path / "hold")}
    server = Server("--model", "demo", env=env)
    server.wait_for("loading demo")
    assert urllib.request.urlopen(f"{server.url}/", timeout=60).status == 200
    assert not any("loaded demo" in line for line in server.lines)
    (tmp_path / "hold").unlink()
    server.wait_for("loaded demo")
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_running_work_with_an_error_and_the_program_with_0(number: signal.Signals):
    server = Server("--drain", "0")
    body = {"model": "demo", "prompt": "word " * 20000}  # tens of seconds of prefill
    response = urllib.request.urlopen(
        f"{server.url}/api/generate", json.dumps(body).encode(), timeout=60
    )
    server.process.send_signal(number)
    last = json.loads(response.readlines()[-1])
    assert "shutting down" in last["error"]
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_aliases_models_dir_and_a_random_model_by_path(tmp_path: Path):
    path = build_model("qwen2", tmp_path / "Tiny-Qwen2")
    server = Server(
        "--models-dir",
        str(tmp_path),
        "--alias",
        "claude-*haiku*=demo",
        "--model",
        str(path),
        "--context",
        "4096",
    )
    try:
        anthropic = {"max_tokens": 8, "messages": [{"role": "user", "content": "say hi"}]}
        answer = ask(server, "/v1/messages", {"model": "claude-sonnet-5-5", **anthropic})
        assert answer["usage"]["output_tokens"] > 0 and answer["model"] == "claude-sonnet-5-5"
        answer = ask(server, "/v1/messages", {"model": "claude-haiku-5-5", **anthropic})
        assert answer["content"][0]["text"] == "hi"
        body = {"model": "tiny-qwen2", "prompt": "hi", "stream": False}
        answer = ask(server, "/api/generate", {**body, "options": {"num_predict": 8}})
        assert answer["done"] and answer["eval_count"] <= 8
        loaded = json.load(urllib.request.urlopen(f"{server.url}/api/ps"))["models"]
        assert {model["name"] for model in loaded} == {"demo:latest", "Tiny-Qwen2:latest"}
        long = {"max_tokens": 5, "messages": [{"role": "user", "content": "word " * 5000}]}
        with pytest.raises(urllib.error.HTTPError, match="400") as failure:
            ask(server, "/v1/messages", {"model": "tiny-qwen2", **long})
        assert "prompt is too long: " in json.load(failure.value)["error"]["message"]
    finally:
        assert server.stop() == 0
