"""Every example of the README runs as it is printed, except that the port is the test server's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Server
from models import build_model
from test_distributed import CONFIG

from mlx_server import arguments

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"## ([^\n]+)\n(?:(?!## ).)*?```(\w+)\n(.*?)```", README, re.DOTALL)
ANSWERS = {"Anthropic's client": "hello from the stream", "OpenAI's client": "one two three",
           "Ollama's client": "1 2 3 4 5", "In a script": "hello world"}


def test_every_example_is_known_here():
    assert {title for title, _, _ in BLOCKS} == {"Start", "Claude Code", "curl", "Many clients", "Several Macs", *ANSWERS}


def test_every_flag_is_described():
    flags = {option for action in arguments()._actions for option in action.option_strings} - {"-h", "--help"}
    described = set(re.findall(r"^\| `(--[\w-]+)", README, re.M))
    assert described == flags


def test_the_example_for_many_clients():
    code = next(code for name, _, code in BLOCKS if name == "Many clients")
    server = Server(*shlex.split(code)[2:])
    assert server.stop() == 0


def test_the_example_for_several_macs_with_this_machine_as_both(tmp_path: Path):
    code = next(code for name, _, code in BLOCKS if name == "Several Macs")
    code = re.sub(r"mac\d\.local|10\.0\.0\.\d", "127.0.0.1", code)
    model = build_model("qwen2", tmp_path / "wide", config=CONFIG)
    code = code.replace("mlx_server.py", f"{ROOT}/mlx_server.py --port 0").replace("qwen3:235b", str(model))
    process = subprocess.Popen(["sh", "-ec", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    loaded = (line for line in process.stderr if "loaded wide" in line)
    assert next(loaded) and next(loaded)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert not re.search(r"\[WARN\]", process.communicate(timeout=60)[1])  # of a status other than 0


@pytest.mark.parametrize("title", ANSWERS)
def test_python_examples(server: Server, title: str):
    code = next(code for name, kind, code in BLOCKS if name == title and kind == "python")
    out = subprocess.run([sys.executable, "-c", code.replace("http://localhost:11435", server.url)], cwd=ROOT,
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and out.stdout.startswith(ANSWERS[title]), out.stderr


def test_curl_examples(server: Server):
    if not shutil.which("curl"):
        pytest.skip("there is no curl on this machine")
    code = next(code for name, _, code in BLOCKS if name == "curl")
    out = subprocess.run(["sh", "-ec", code.replace("http://localhost:11435", server.url)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert '"text":"hello"' in out.stdout and "демо" in out.stdout and '"name":"demo:latest"' in out.stdout


def test_the_installed_command_is_the_program():
    command = Path(sys.executable).with_name("mlx-server")
    if not command.exists():
        pytest.skip("the project is not installed in this environment")
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.startswith("mlx-server")


def test_claude_code(server: Server, tmp_path: Path):
    """The real CLI with the README's variables: a real tool call, with and without --model, and a second turn."""
    cli = os.environ.get("CLAUDE_CLI")
    if not cli:
        pytest.skip("CLAUDE_CLI does not name Claude Code's program; .ci/run does")
    exports = next(code for name, _, code in BLOCKS if name == "Claude Code").splitlines()[0]
    project, home = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    home.mkdir()
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "IS_SANDBOX": "1", "DISABLE_TELEMETRY": "1",
             "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}

    def claude(*flags: str) -> str:
        script = f'{exports.replace("http://localhost:11435", server.url)}\nexec "$@"'
        out = subprocess.run(["sh", "-c", script, "sh", cli, "-p", *flags, "--permission-mode", "acceptEdits",
                              "--allowedTools", "Bash Read Edit Write"], cwd=project, env=clean, stdin=subprocess.DEVNULL,
                             capture_output=True, text=True, timeout=400)
        assert out.returncode == 0, out.stdout + out.stderr
        return out.stdout

    answer = "The tool answered: hello-from-mlx"
    assert answer in claude("run echo hello-from-mlx", "--model", "demo")
    seen = len(server.lines)
    assert "The tool answered: second" in claude("run echo second", "--model", "demo", "--continue")
    prompt, reused = map(int, server.wait_for(r"prompt (\d+), reused (\d+),", since=seen).groups())
    assert reused > 0.9 * prompt
    assert answer in claude("run echo hello-from-mlx")
