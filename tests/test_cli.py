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

from _mlx_server.front.cli import parse_arguments


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
        (["--memory", "8"], "'8' is 8 bytes; say a size like 512MB or 8GB"),
        (["--frobnicate"], "frobnicate"),
        (["frobnicate"], "there is no command 'frobnicate'"),
        (["show"], "show: it takes a model's NAME"),
        (["list", "qwen"], "nothing stands behind it, not 'qwen' either"),
        (["list", "--", "-x"], "belong to launch"),
        (["--port", "0", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--port", "0", "--model", "no-such-model:7b"], "not found"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
    ],
)
def test_mistakes_are_told_in_a_line(flags: list[str], said: str):
    result = run(*flags)
    assert result.returncode != 0
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "text, number", [("4096", 4096), ("128k", 131072), ("1K", 1024), ("40k", 40960)]
)
def test_tokens_may_be_thousands(text: str, number: int):
    assert parse_arguments(["--context", text]).context == number


def test_usage_errors_are_one_line_and_help_is_grouped():
    out = run("--frobnicate")
    assert (out.returncode, out.stderr.count("\n")) == (2, 1) and "see --help" in out.stderr
    text = run("help").stdout
    assert text == run("--help").stdout
    for part in ("commands:", "  launch AGENT ", "memory:", "access:", "prompt cache:"):
        assert part in text


@pytest.mark.slow
def test_the_servers_models_are_listed_and_unloaded_at_the_keyboard(server: Server):
    port = ["--port", str(server.port)]
    ask(server, "/api/generate", {"model": "demo", "stream": False})
    lines = run("ps", *port).stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "CONTEXT", "UNTIL"]
    assert lines[1].split(maxsplit=4)[0] == "demo" and "its memory is needed" in lines[1]
    assert run("stop", "demo", *port).stdout == "unloaded demo\n"
    assert len(run("ps", *port).stdout.splitlines()) == 1
    out = run("ps", "--port", "1")
    assert out.returncode == 1 and "no server listens at http://127.0.0.1:1; " in out.stderr


def test_folders_without_models_are_told_at_the_start(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf" / "org").mkdir(parents=True)
    (tmp_path / "gguf" / "org" / "x.gguf").touch()
    names = ("none", "file", "empty", "gguf")
    server = Server(*(word for name in names for word in ("--models-dir", str(tmp_path / name))))
    for said in (
        "none does not exist",
        "file is a file",
        "empty is empty",
        r"gguf holds GGUF weights \(x.gguf\)",
    ):
        server.wait_for(f"no model in --models-dir: .*{said}")
    assert server.stop() == 0 and "has ended" in server.lines[-1]


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
    server.wait_for("1 answer may take 0 s to end; a second Ctrl-C or signal ends all now")
    last = json.loads(response.readlines()[-1])
    assert "shutting down" in last["error"]
    assert server.process.wait(60) == 0


# A signal comes while what another one has begun holds the watchdog's lock
INTERRUPTED = """
import faulthandler, os, signal, sys, time
import mlx_server

later = faulthandler.dump_traceback_later


def interrupted(seconds, **options):
    if seconds > 1000:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    later(seconds, **options)


faulthandler.dump_traceback_later = interrupted
sys.exit(mlx_server.main())
"""


def test_a_signal_that_comes_while_another_is_handled_ends_the_server():
    server = Server("--drain", "1000", command=(sys.executable, "-c", INTERRUPTED))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_what_the_first_lets_run():
    server = Server("--drain", "1000")
    body = {"model": "demo", "prompt": "word " * 20000}
    response = urllib.request.urlopen(
        f"{server.url}/api/generate", json.dumps(body).encode(), timeout=60
    )
    server.process.send_signal(signal.SIGINT)
    server.wait_for("1 answer may take 1000 s to end")
    server.process.send_signal(signal.SIGINT)
    server.wait_for("unfinished answers: 1")
    assert "shutting down" in json.loads(response.readlines()[-1])["error"]
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
