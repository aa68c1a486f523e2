"""`launch` starts an agent that uses this server, and what fails starts nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Server, example
from models import build_model

PROGRAM = [sys.executable, str(ROOT / "mlx_server.py")]
# Leaves its words and its environment, and ends with status 7
STUB = """#!{python}
import json, os, sys
with open({file!r}, "w") as file:
    json.dump([sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read()], file)
sys.exit(7)
"""


class Machine:
    """A home with agents that only say how they were started."""

    def __init__(self, folder: Path):
        self.home, self.programs = folder / "home", folder / "programs"
        self.project, self.told = folder / "my project", folder / "started"
        for path in (self.home, self.programs, self.project):
            path.mkdir()
        for name in ("claude", "codex", "opencode"):
            stub = STUB.format(python=sys.executable, file=str(self.told))
            (self.programs / name).write_text(stub)
            (self.programs / name).chmod(0o755)
        self.env = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "HOME": str(self.home),
            "HF_HUB_CACHE": "/nonexistent",
            "MARKED": "mine",
        }

    def run(self, *words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*PROGRAM, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=self.project,
            env={**self.env, **env},
        )

    def shell(self, script: str, shell: str = "sh", **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shell, "-c", script],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=self.project,
            env={**self.env, **env},
        )

    def started(self) -> tuple[list[str], dict[str, str], str, str] | None:
        """Words, environment, folder and input of the agent, None if none was started."""
        if not self.told.exists():
            return None
        started = json.loads(self.told.read_text())
        self.told.unlink()
        return tuple(started)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


def listens(port: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(port)), 5).close()
    except OSError:
        return False
    return True


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def without_tools(folder: Path) -> Path:
    return build_model("qwen2", folder / "Mute-1B-4bit", template="{{ messages[0].content }}")


# ------------------------------------------------------------------ with a server that runs


def test_an_agent_takes_the_process_over_in_this_folder_and_for_itself_alone(
    server: Server, machine: Machine
):
    out = machine.run("launch", "claude", "--port", str(server.port), "--", "-p", "hi", stdin="in")
    assert out.returncode == 7 and out.stdout == ""
    words, env, folder, stdin = machine.started()
    assert words == ["--permission-mode", "acceptEdits", "-p", "hi"]
    assert (folder, stdin, env["MARKED"]) == (str(machine.project), "in", "mine")
    assert (env["ANTHROPIC_BASE_URL"], env["ANTHROPIC_MODEL"]) == (server.url, "demo")
    printed = machine.run("--print-env", "--port", str(server.port)).stdout
    exports = [line.removeprefix("export ").partition("=") for line in printed.splitlines()]
    assert exports and all(env[name] == "".join(shlex.split(value)) for name, _, value in exports)
    assert {name for name in env if name.startswith(("ANTHROPIC", "CLAUDE", "API_"))} == {
        name for name, _, _ in exports
    }


@pytest.mark.slow
def test_codex_is_told_by_its_flags_and_opencode_by_its_environment(
    server: Server, machine: Machine
):
    flags = ["--port", str(server.port), "--model", "demo:latest", "--context", "40k"]
    machine.run("launch", "codex", *flags, "--", "exec", "hi")
    words, env, _, _ = machine.started()
    assert words[-2:] == ["exec", "hi"] and words[0] == "-c"
    assert f'base_url="{server.url}/v1"' in words[1] and "env_key" not in words[1]
    assert {'model_provider="mlx"', 'model="demo"', "model_context_window=40960"} <= set(words)
    machine.run("launch", "opencode", *flags)
    words, env, _, _ = machine.started()
    config = json.loads(env["OPENCODE_CONFIG_CONTENT"])
    assert words == [] and config["model"] == config["small_model"] == "mlx/demo"
    assert config["provider"]["mlx"]["options"]["baseURL"] == f"{server.url}/v1"
    model = config["provider"]["mlx"]["models"]["demo"]
    assert model["limit"] == {"context": 40960, "output": 5120} and not model["attachment"]
    assert not list(machine.home.iterdir())


def test_the_printed_line_starts_it_in_any_shell_and_leaves_no_variable(
    server: Server, machine: Machine
):
    flags = ["--port", str(server.port), "--", "--permission-mode=plan", "it's"]
    line = machine.run("launch", "--print", "claude", *flags).stdout.strip()
    assert "\n" not in line and str(machine.programs / "claude") in line
    out = machine.shell(f"{line}; echo left=$ANTHROPIC_BASE_URL")
    assert out.stdout == "left=\n"
    words, env, _, _ = machine.started()
    assert words == ["--permission-mode=plan", "it's"] and env["ANTHROPIC_BASE_URL"] == server.url


@pytest.mark.slow
def test_a_key_and_the_servers_own_models_are_asked_of_the_server(machine: Machine, tmp_path: Path):
    models = tmp_path / "models"
    shutil.copytree(ROOT / "tests" / "demo", models / "Mine-1B-4bit")
    without_tools(models)
    flags = ["--models-dir", str(models), "--alias", "claude-haiku-*=demo", "--api-key", "s'cret"]
    server = Server(*flags, "--context", "65536")
    port = ["--port", str(server.port)]
    try:
        out = machine.run("launch", "claude", *port)
        assert out.returncode == 1 and "wants one of its keys: --api-key" in out.stderr
        out = machine.run("launch", "claude", *port, MLX_SERVER_API_KEY="wrong")
        assert out.returncode == 1 and machine.started() is None
        out = machine.run("launch", "claude", *port, "--api-key", "s'cret")
        _, env, _, _ = machine.started()
        assert env["ANTHROPIC_MODEL"] == env["ANTHROPIC_DEFAULT_FABLE_MODEL"] == "Mine-1B-4bit"
        assert env["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "demo"
        assert env["ANTHROPIC_AUTH_TOKEN"] == "s'cret"
        assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
        out = machine.run("launch", "codex", *port, "--api-key", "s'cret")
        words, env, _, _ = machine.started()
        assert 'env_key="MLX_SERVER_API_KEY"' in words[1] and "s'cret" not in str(words)
        assert env["MLX_SERVER_API_KEY"] == "s'cret"
        key = ["--api-key", "s'cret"]
        out = machine.run("launch", "claude", *port, *key, "--model", "mute")
        assert out.returncode == 1 and "'Mute-1B-4bit' cannot use tools" in out.stderr
        out = machine.run("launch", "claude", *port, *key, "--model", "no-such:1b")
        assert out.returncode == 1 and "no-such:1b (installed: Mine" in out.stderr
        assert machine.started() is None
    finally:
        assert server.stop() == 0


# ------------------------------------------------------------------ with one of its own


@pytest.mark.slow
def test_a_server_is_started_for_the_agent_and_ends_with_it(machine: Machine):
    port = free_port()
    out = machine.run("launch", "claude", "--port", port, "--no-cache-dir")
    assert out.returncode == 7, out.stderr
    _, env, _, _ = machine.started()
    assert env["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{port}"
    log = Path(re.search("its log: (.*)", out.stderr)[1])
    assert "mlx-server has ended" in log.read_text() and log.is_relative_to(machine.home)
    assert "demo was loaded in" in out.stderr and not listens(port)


@pytest.mark.slow
def test_a_server_that_is_kept_serves_the_next_agent(machine: Machine):
    port = free_port()
    flags = ["--port", port, "--no-cache-dir"]
    log = machine.home / "my.log"
    out = machine.run("launch", "claude", *flags, "--keep", "--log-file", str(log))
    assert out.returncode == 7 and machine.started() and listens(port)
    again = machine.run("launch", "claude", *flags)
    assert again.returncode == 7 and machine.started() and "started" not in again.stderr
    holder = machine.shell(f"ps -eo pid,args | grep -- '--port {port} ' | grep -v grep").stdout
    os.kill(int(holder.split()[0]), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_agent_and_the_server_ends(machine: Machine, number: signal.Signals):
    """What ends by a signal has the shell's status for it."""
    ready = machine.home / "ready"
    (machine.programs / "claude").write_text(f"#!/bin/sh\ntouch {ready}\nexec sleep 1000\n")
    port = free_port()
    process = subprocess.Popen(
        [*PROGRAM, "launch", "claude", "--port", port, "--no-cache-dir"],
        cwd=machine.project,
        env=machine.env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not ready.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)  # which is the agent's
    process.send_signal(number)
    assert process.wait(PATIENCE) == 128 + number and not listens(port)


# ------------------------------------------------------------------ what must start nothing


@pytest.mark.parametrize(
    "words, said",
    [
        slow(["claude", "--model", "no-such:1b"], "'no-such:1b' not found"),
        slow(["claude", "--model", "/no/such/folder"], "/no/such/folder"),
        (["claude", "--models-dir", "MUTE", "--model", "mute"], "cannot use tools"),
        (["claude", "--models-dir", "/no/such/folder"], "/no/such/folder does not exist"),
        slow(["claude", "--cache-dir", "/dev/null"], "cannot keep a prompt cache in /dev/null"),
        (["claude", "--modle", "demo"], "--modle"),
        slow(["claude", "-p", "say hi"], "if that is for claude: launch claude -- -p 'say hi';"),
        (["--port", "0", "claude"], "--port"),
        slow(["cloud"], "one of claude, codex, opencode"),
        slow([], "one of claude, codex, opencode"),
    ],
)
def test_what_cannot_be_launched_says_why(
    machine: Machine, tmp_path: Path, words: list[str], said: str
):
    models = tmp_path / "models"
    without_tools(models)
    words = [str(models) if word == "MUTE" else word for word in words]
    flags = [] if "--port" in words else ["--port", free_port()]
    out = machine.run("launch", *words, *flags)
    assert out.returncode and said in out.stderr.splitlines()[-1], out.stderr
    assert machine.started() is None and out.stdout == ""


def test_an_agent_that_is_not_installed_is_told_with_its_vendors_command(machine: Machine):
    for name, install in (("claude", "claude.ai/install.sh"), ("codex", "npm install -g")):
        out = machine.run("launch", name, PATH="/nonexistent")
        assert out.returncode == 1 and out.stderr.count("\n") == 1 and install in out.stderr
    assert machine.started() is None


@pytest.mark.slow
def test_a_port_that_another_program_has_starts_nothing(machine: Machine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        out = machine.run("launch", "claude", "--port", str(port))
    assert out.returncode == 1 and f"--port {port + 1}" in out.stderr
    assert machine.started() is None


FAILURES = {
    "a typo in the flag itself": None,
    "a bad model": "--model no-such:1b",
    "a typo": "--modle demo",
    "a bad value": "--port http",
    "a folder of models that is not there": "--models-dir /no/such/folder",
    "a model without tools": "--models-dir MUTE --model mute",
    "a file of keys that is not there": "--api-key-file /no/such/file",
}


@pytest.mark.parametrize("failure", ["a typo in the flag itself", *map(slow, list(FAILURES)[1:])])
def test_variables_that_fail_start_nothing(machine: Machine, tmp_path: Path, failure: str):
    """Neither by the README's line, nor where only the output counts."""
    models = tmp_path / "models"
    without_tools(models)
    flags = (FAILURES[failure] or "").replace("MUTE", shlex.quote(str(models)))
    env = "--print-env" if FAILURES[failure] else "--pritn-env"
    program = shlex.join(PROGRAM)
    line = example("--print-env").replace(
        "python mlx_server.py --print-env", f"{program} {env} {flags}"
    )
    assert machine.shell(line).returncode
    out = machine.shell(f'eval "$({program} {env} {flags})" && claude')
    assert out.returncode and "mlx-server: " in out.stderr and machine.started() is None


def test_the_readmes_line_starts_nothing_from_another_folder_and_leaves_nothing(machine: Machine):
    line = example("--print-env")
    assert machine.shell(line).returncode and machine.started() is None  # no such file
    good = line.replace("python mlx_server.py", f"{shlex.join(PROGRAM)} --port {free_port()}")
    out = machine.shell(f"{good}; env")
    assert machine.started() and "ANTHROPIC" not in out.stdout
    assert "no server listens" in out.stderr


# ------------------------------------------------------------------ the real programs


def real(variable: str, program: str, machine: Machine) -> None:
    """Makes a real agent the one on the path, for `launch` finds it there."""
    cli = os.environ.get(variable)
    if not cli:
        pytest.skip(f"{variable} does not name {program}'s program; .ci/run does")
    (machine.programs / program).unlink()
    (machine.programs / program).symlink_to(cli)
    machine.env["PATH"] = f"{machine.programs}:{os.environ['PATH']}"


@pytest.mark.clients
@pytest.mark.parametrize("kept", [False, True])
def test_claude_code_runs_a_tool(machine: Machine, kept: bool):
    real("CLAUDE_CLI", "claude", machine)
    port, server = free_port(), None
    if kept:
        server = Server()
        port = str(server.port)
    quiet = {
        "IS_SANDBOX": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    words = ["-p", "run echo hello", "--allowedTools", "Bash"]
    out = machine.run("launch", "claude", "--port", port, "--", *words, **quiet)
    assert (out.returncode, out.stdout) == (0, "The tool answered: hello\n"), out.stderr
    assert listens(port) == kept
    assert server is None or server.stop() == 0


@pytest.mark.clients
def test_codex_answers_and_runs_a_tool(machine: Machine):
    real("CODEX_CLI", "codex", machine)
    port = free_port()
    words = ["exec", "--skip-git-repo-check"]
    out = machine.run("launch", "codex", "--port", port, "--", *words, "say hello from codex")
    assert (out.returncode, out.stdout) == (0, "hello from codex\n"), out.stderr
    out = machine.run("launch", "codex", "--port", port, "--", *words, "run echo hello")
    # The first line of what its tool answers is no line of the command's
    assert out.returncode == 0 and out.stdout.startswith("The tool answered: "), out.stderr
    assert "echo hello" in out.stderr and "\nhello\n" in out.stderr
    assert not listens(port)


@pytest.mark.clients
def test_opencode_runs_a_tool_and_can_choose_no_vendors_model(machine: Machine):
    real("OPENCODE_CLI", "opencode", machine)
    port = free_port()
    words = ["run", "--format", "json", "run", "echo", "hello"]
    out = machine.run("launch", "opencode", "--port", port, "--", *words)
    events = [json.loads(line) for line in out.stdout.splitlines()]
    parts = [event["part"] for event in events]
    (call,) = [part["state"] for part in parts if part["type"] == "tool"]
    assert (call["input"]["command"], call["output"]) == ("echo hello", "hello\n"), out.stderr
    said = [part["text"] for part in parts if part["type"] == "text"]
    assert (out.returncode, said) == (0, ["The tool answered: hello"]) and not listens(port)
    menu = machine.run("launch", "opencode", "--port", port, "--", "models")
    assert (menu.returncode, menu.stdout) == (0, "mlx/demo\n")
