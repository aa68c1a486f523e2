"""From nothing to an agent on a local model: what the program says at the keyboard."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, Server, example
from models import build_model

PROGRAM = [sys.executable, str(ROOT / "mlx_server.py")]


def run(*words: str, program: list[str] = PROGRAM, **env: str) -> subprocess.CompletedProcess:
    """The program in a home where nothing is."""
    fresh = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **env}
    return subprocess.run(
        [*program, *words], capture_output=True, text=True, timeout=120, env=fresh
    )


def shell(script: str, folder: Path) -> dict[str, str]:
    """The environment that a `claude` typed in a shell gets, by a program of that name."""
    (folder / "claude").write_text("#!/bin/sh\nenv")
    (folder / "claude").chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    out = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, timeout=120, env=env, cwd=folder
    )
    return dict(line.split("=", 1) for line in out.stdout.splitlines())


def give(folder: Path, name: str, modified: float = 0) -> Path:
    """A copy of the demo."""
    path = shutil.copytree(ROOT / "tests" / "demo", folder / name)
    os.utime(path / "model.safetensors", (modified, modified))
    return path


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two models and a key, which logs JSON."""
    models = tmp_path_factory.mktemp("my models")
    give(models, "Old-1B-4bit", 1), give(models, "New-1B-4bit", 2)
    server = Server(
        "--models-dir", str(models), "--context", "4096", "--api-key", "secret", "--log-json"
    )
    yield server
    assert server.stop() == 0


def message(server: Server, start: str) -> str:
    """The message in a JSON log that begins so."""
    return json.loads(server.wait_for(f'.*"message": "{re.escape(start)}.*')[0])["message"]


# ------------------------------------------------------------------ the first lines


def test_without_models_the_toy_is_named_and_the_printed_line_starts_an_agent(
    server: Server, tmp_path: Path
):
    line = server.wait_for(r"Claude Code, in another terminal: (.* launch claude .*)")[1]
    assert "none but the built-in demo" in server.wait_for("models: .*")[0]
    assert "mlx_server.py pull" in server.wait_for("DEFAULT: demo, A TOY .*")[0]
    env = shell(line, tmp_path)
    assert env["ANTHROPIC_BASE_URL"] == server.url
    body = {
        "model": env["ANTHROPIC_MODEL"],
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "say hi"}],
    }
    headers = {"Authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"}
    request = urllib.request.Request(
        f"{env['ANTHROPIC_BASE_URL']}/v1/messages", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["content"][0]["text"] == "hi"


def test_models_are_listed_and_the_newest_is_the_default_here_and_in_the_printed_line(
    machine: Server, tmp_path: Path
):
    assert re.search(r"New-1B-4bit \(5 MB\), Old-1B-4bit \(5 MB\)$", message(machine, "models: "))
    assert message(machine, "default: New-1B-4bit, the newest that can use tools")
    assert "secret" not in "".join(machine.lines)
    env = shell(
        message(machine, "Claude Code, ").partition(": ")[2].replace("YOUR_KEY", "secret"),
        tmp_path,
    )
    assert (env["ANTHROPIC_MODEL"], env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"]) == (
        "New-1B-4bit",
        "4096",
    )
    assert (env["ANTHROPIC_BASE_URL"], env["ANTHROPIC_AUTH_TOKEN"]) == (machine.url, "secret")


# ------------------------------------------------------------------ the environment


def test_the_environment_follows_the_flags(tmp_path: Path):
    path = give(tmp_path, "My-1B-4bit")
    flags = [
        "--print-env",
        "claude",
        "--host",
        "::",
        "--port",
        "1234",
        "--model",
        str(path),
        "--context",
        "40960",
        "--alias",
        "claude-haiku-*=demo",
        "--api-key",
        "s'cret=low",
    ]
    out = run(*flags)
    assert out.returncode == 0 and "no server listens at http://[::1]:1234 yet" in out.stderr
    env = shell(f"{out.stdout} claude", tmp_path)
    assert (
        env.items()
        >= {
            "ANTHROPIC_BASE_URL": "http://[::1]:1234",
            "ANTHROPIC_AUTH_TOKEN": "s'cret",
            "ANTHROPIC_API_KEY": "",
            "ANTHROPIC_MODEL": "My-1B-4bit",
            "ANTHROPIC_DEFAULT_OPUS_MODEL": "My-1B-4bit",
            "ANTHROPIC_DEFAULT_SONNET_MODEL": "My-1B-4bit",
            "ANTHROPIC_DEFAULT_FABLE_MODEL": "My-1B-4bit",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "demo",
            "ANTHROPIC_SMALL_FAST_MODEL": "demo",
            "CLAUDE_CODE_SUBAGENT_MODEL": "My-1B-4bit",
            "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1",
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "40960",
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "5120",
            "API_TIMEOUT_MS": "3000000",
            "API_FORCE_IDLE_TIMEOUT": "0",
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "900000",
        }.items()
    )
    assert "CLAUDE_CODE_MAX_OUTPUT_TOKENS=700\n" in run(*flags, "--max-tokens", "700").stdout
    for context, left in (("4096", "0"), ("32k", "3,600"), ("40k", "10,800"), ("64000", None)):
        warned = "conversation" in (said := run(*flags, "--context", context).stderr)
        assert warned == (left is not None) and (not left or f"leave {left} of them" in said)


def test_the_readmes_line_starts_an_agent_on_the_default_port(tmp_path: Path):
    env = shell(
        example("--print-env").replace("python mlx_server.py", shlex.join(PROGRAM)), tmp_path
    )
    assert (env["ANTHROPIC_BASE_URL"], env["ANTHROPIC_MODEL"]) == ("http://127.0.0.1:11435", "demo")


# ------------------------------------------------------------------ the commands


@pytest.mark.slow
def test_models_are_listed_shown_and_removed(tmp_path: Path):
    give(tmp_path, "My-1B-4bit")
    flags = ["--models-dir", str(tmp_path), "--state", str(tmp_path / "presets.json")]
    listed = run("list", *flags).stdout.splitlines()
    assert listed[0].split() == ["NAME", "SHORT", "SIZE", "CONTEXT", "TOOLS", "SEES"]
    assert listed[-1].split() == ["*", "My-1B-4bit", "my:1b", "5", "MB", "131,072", "yes", "no"]
    assert run("ls", *flags).stdout.splitlines() == listed
    shown = run(*flags, "show", "my:1b").stdout
    assert re.search(
        r"name +My-1B-4bit\narchitecture +gear\nparameters +2\.4M\nquantization +F16\n"
        r"context +131,072 tokens\ncapabilities +completion, tools, thinking\n"
        rf"size +5 MB\npath +{tmp_path}",
        shown,
    )
    give(tmp_path, "My-1B-8bit")
    both = run("rm", *flags, "my:1b")
    assert both.returncode == 1 and "My-1B-4bit, My-1B-8bit" in both.stderr
    assert run("rm", *flags, "my-1b-8bit").stdout == "deleted My-1B-8bit\n"
    removed = run("rm", *flags, "my:1b")
    assert removed.stdout == "deleted My-1B-4bit\n" and not (tmp_path / "My-1B-4bit").exists()
    again = run(*flags, "show", "My-1B-4bit")
    assert (
        again.returncode == 1
        and again.stderr == "mlx-server: model 'My-1B-4bit' not found; installed: demo\n"
    )


def typed(answer: str, *words: str) -> tuple[int, str]:
    """The exit status of the program at a terminal where a line was typed, and what it said."""
    keyboard, terminal = pty.openpty()
    os.write(keyboard, answer.encode() + b"\n")
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    files = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    status = subprocess.run([*PROGRAM, *words], env=env, timeout=120, **files).returncode
    said = os.read(keyboard, 4096).decode()
    os.close(keyboard), os.close(terminal)
    return status, said.replace("\r\n", "\n").removeprefix(answer + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, asked", [("my:1b", "delete My-1B-4bit, 5 MB? [y/N] "), ("demo", "")]
)
def test_at_a_terminal_rm_asks_first_but_not_in_vain(tmp_path: Path, name: str, asked: str):
    folder = give(tmp_path, "My-1B-4bit")
    command = "rm", "--models-dir", str(tmp_path), "--state", str(tmp_path / "presets.json"), name
    refused = "" if asked else "model 'demo' is not this server's to delete"
    assert typed("n", *command) == (1, f"{asked}mlx-server: {refused or 'nothing was deleted'}\n")
    assert typed("y", *command)[0] == bool(refused) and folder.exists() == bool(refused)


# ------------------------------------------------------------------ the log


def test_every_line_of_a_json_log_is_an_object_and_a_requests_figures_are_fields(machine: Server):
    body = json.dumps({"model": "default", "prompt": "say hi", "stream": False}).encode()
    request = urllib.request.Request(
        f"{machine.url}/api/generate", body, {"Authorization": "Bearer secret"}
    )
    assert json.load(urllib.request.urlopen(request, timeout=60))["response"] == "hi"
    machine.wait_for("/api/generate New-1B-4bit")
    lines = [json.loads(line) for line in machine.lines]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    line = next(line for line in lines if line.get("route") == "/api/generate")
    assert (line["level"], line["model"], line["ending"], line["miss"]) == (
        "info",
        "New-1B-4bit",
        "stop",
        None,
    )
    assert line["prompt_tokens"] > line["cached_tokens"] == 0 < line["completion_tokens"]
    assert 0 < line["first_token_seconds"] < line["seconds"] and line["tokens_per_second"] > 0
    assert message(machine, "loading New-1B-4bit, 5 MB")
    assert re.search(r"in \d+\.\d s$", message(machine, "loaded New-1B-4bit "))


# ------------------------------------------------------------------ what can go wrong


def said(*words: str, program: list[str] = PROGRAM, **env: str) -> str:
    """The one line that the program ends with instead of serving."""
    out = run(*words, program=program, **env)
    assert out.returncode == 1 and out.stdout == "" and out.stderr.count("\n") == 1, out.stderr
    return out.stderr


class OllamaLike(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/" else 404)
        self.end_headers()
        self.wfile.write(b"Ollama is running")

    def log_message(self, *_: object) -> None:
        pass


def test_a_taken_port_is_told_with_its_holder_and_another_port(server: Server):
    assert f"in use by another mlx-server; take another one: --port {server.port + 1}" in said(
        "--port", str(server.port)
    )
    with HTTPServer(("127.0.0.1", 0), OllamaLike) as ollama:
        threading.Thread(target=ollama.serve_forever, args=(0.05,), daemon=True).start()
        assert "in use by Ollama" in said("--port", str(ollama.server_port))
        ollama.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("lsof"), reason="there is no lsof on this machine")
def test_the_holder_of_a_port_that_says_nothing_is_found_in_the_list_of_open_files():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert f"(process {os.getpid()})" in said("--port", str(taken.getsockname()[1]))


def test_a_model_that_memory_cannot_hold_is_refused_with_one_that_fits(tmp_path: Path):
    give(tmp_path, "Big-1B-4bit")
    build_model("qwen2", tmp_path / "Small-1B-4bit")
    told = said("--port", "0", "--models-dir", str(tmp_path), "--model", "big", "--memory", "2MB")
    assert (
        "'Big-1B-4bit' needs 5 MB of memory, and 2 MB can be used; 'Small-1B-4bit' (1 MB) fits"
        in told
    )


@pytest.mark.slow
def test_what_is_no_mlx_model_is_told_with_a_way_out(tmp_path: Path):
    snapshot = tmp_path / "models--org--x-GGUF" / "snapshots" / "c0ffee"
    torch = tmp_path / "torch"
    for folder, file in ((snapshot, "x.gguf"), (torch, "pytorch_model.bin")):
        folder.mkdir(parents=True)
        (folder / file).touch()
    (torch / "config.json").write_text("{}")
    for model, why in (
        (str(snapshot / "x.gguf"), "GGUF weights (x.gguf)"),
        ("org/x-GGUF", "GGUF weights (x.gguf)"),
        (str(torch), "PyTorch weights (pytorch_model.bin)"),
    ):
        told = said("--port", "0", "--model", model, HF_HUB_CACHE=str(tmp_path))
        assert "is not an MLX model" in told and f"{why}; get the model's MLX version" in told
    assert "mlx_server.py pull org/y" in said("--port", "0", "--model", "org/y")


def test_a_machine_that_cannot_run_mlx_is_told_why():
    told = said(program=[sys.executable, "-S", PROGRAM[1]])  # without site-packages
    assert (
        "MLX cannot be imported (No module named 'mlx" in told
        and "-m pip install mlx mlx-lm" in told
    )
    patch = (
        "import os, runpy, sys; sys.argv = ['mlx_server.py']; {}; "
        "runpy.run_path('mlx_server.py', run_name='__main__')"
    )
    intel = "os.uname = lambda: os.uname_result(('Darwin', 'mac', '24', '', 'x86_64'))"
    assert "needs Apple silicon" in said(program=[sys.executable, "-c", patch.format(intel)])
    blind = (
        "import mlx.core as mx; mx.metal.is_available = lambda: True; "
        "mx.device_info = lambda: (_ for _ in ()).throw(RuntimeError('No Metal device available'))"
    )
    assert "finds no GPU: No Metal device" in said(
        program=[sys.executable, "-c", patch.format(blind)]
    )
    old = "sys.version_info, sys.version = (3, 9, 6, 'final', 0), '3.9.6 (x)'"
    assert "needs Python 3.11 or newer, not 3.9.6" in said(
        program=[sys.executable, "-c", patch.format(old)]
    )


def test_an_old_python_can_read_the_program_so_far_that_it_says_so():
    ast.parse((ROOT / "mlx_server.py").read_text("utf-8"), feature_version=(3, 8))
