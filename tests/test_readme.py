"""Every example of the README and of `docs/` runs as it is printed, except that the port is the
test server's."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PAGES, PATIENCE, ROOT, Server, example, examples
from models import build_model
from test_distributed import CONFIG

from _mlx_server.front.cli import arguments

EXAMPLES = {shown.title: shown.code for shown in examples()}
ANSWERS = {
    "Anthropic's client": "hello from the stream",
    "OpenAI's client": "one two three",
    "Ollama's client": "1 2 3 4 5",
    "In a script": "hello world",
}


def test_every_example_is_run():
    """Here, or where it says."""
    elsewhere = {
        ("README.md", "A model"),  # test_pull.py
        ("README.md", "Development"),  # .ci/run
        ("docs/clients.md", "Codex"),  # test_clients.py
        ("docs/images.md", "Images"),  # test_vision.py
        ("docs/performance.md", "How to measure"),  # test_bench.py
    }
    assert sorted((shown.page, shown.title) for shown in examples()) == sorted(
        [
            ("README.md", "Install"),
            ("README.md", "Claude Code"),
            ("README.md", "curl"),
            ("docs/clients.md", "Claude Code"),
            ("docs/many-clients.md", "Priorities"),
            ("docs/service.md", "Linux"),
            ("docs/service.md", "macOS"),
            ("docs/several-macs.md", "Several Macs"),
            *(("README.md", title) for title in ANSWERS),
            *elsewhere,
        ]
    )


def test_the_russian_quick_start_shows_the_same_examples():
    russian = {shown.code for shown in examples("README.ru.md")}
    assert russian and russian <= {shown.code for shown in examples("README.md")}


def test_every_flag_is_described():
    flags = {*re.findall(r"^  (--[\w-]+)", arguments().format_help(), re.M)}
    page = (ROOT / "docs" / "flags.md").read_text("utf-8")
    assert {*re.findall(r"^\| `(--[\w-]+)", page, re.M)} == flags


@pytest.mark.parametrize("page", ["README.ru.md", "CONTRIBUTING.md", "SECURITY.md", *PAGES])
def test_every_link_within_the_tree_leads_somewhere(page: str):
    """To a file that exists and, behind a `#`, a heading in it."""
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text("utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings]
        assert not anchor or anchor in anchors, target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 250


def test_continuous_integration_runs_the_readmes_test_command():
    run = (ROOT / ".ci" / "run").read_text("utf-8")
    assert EXAMPLES["Development"] in run.replace(" -q ", " ")


@pytest.mark.slow
def test_the_installation_in_a_copy_of_the_tree(tmp_path: Path):
    """Of the packages that pip finds, only the project itself is new: the others are this
    environment's."""
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=hidden)
    create, install = EXAMPLES["Install"].splitlines()
    subprocess.run(["sh", "-ec", create], cwd=tree, check=True)
    (packages,) = tree.glob(".venv/lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    script = f'. .venv/bin/activate && {install.replace("python", "exec python")} "$@"'
    server = Server(command=["sh", "-ec", script, "sh"], folder=tree)
    assert server.stop() == 0


@pytest.mark.parametrize("title", ["macOS", "Linux"])
def test_the_file_of_a_service_is_made(tmp_path: Path, title: str):
    code = EXAMPLES[title].replace("mlx_server.py", f"{ROOT}/mlx_server.py", 1)
    code = code.replace("python", sys.executable, 1)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["sh", "-ec", code], env=env, check=True, timeout=PATIENCE)
    file = tmp_path / shlex.split(code)[-1].removeprefix("~/")
    assert str(ROOT / "mlx_server.py") in file.read_text("utf-8")


@pytest.mark.slow
def test_the_example_for_many_clients():
    server = Server(*shlex.split(EXAMPLES["Priorities"])[2:])
    assert server.stop() == 0


@pytest.mark.slow
def test_the_example_for_several_macs_with_this_machine_as_both(tmp_path: Path):
    code = re.sub(r"mac\d\.local|10\.0\.0\.\d", "127.0.0.1", EXAMPLES["Several Macs"])
    model = build_model("qwen2", tmp_path / "wide", config=CONFIG)
    code = code.replace("mlx_server.py", f"{ROOT}/mlx_server.py --port 0")
    process = subprocess.Popen(
        ["sh", "-ec", code.replace("qwen3:235b", str(model))],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    loaded = (line for line in process.stderr if "loaded wide" in line)
    assert next(loaded, None) and next(loaded, None)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    # Of a status other than 0
    assert not re.search(r"\[WARN\]", process.communicate(timeout=PATIENCE)[1])


@pytest.mark.parametrize("title", ANSWERS)
def test_python_examples(server: Server, title: str):
    command = [sys.executable, "-c", EXAMPLES[title].replace("http://localhost:11435", server.url)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert out.returncode == 0 and out.stdout.startswith(ANSWERS[title]), out.stderr


def test_curl_examples(server: Server):
    if not shutil.which("curl"):
        pytest.skip("there is no curl on this machine")
    command = ["sh", "-ec", EXAMPLES["curl"].replace("http://localhost:11435", server.url)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for part in ('"text":"hello"', "демо", '"name":"demo:latest"'):
        assert part in out.stdout


def test_the_installed_command_is_the_program():
    command = Path(sys.executable).with_name("mlx-server")
    if not command.exists():
        pytest.skip("the project is not installed in this environment")
    out = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert out.stdout.startswith("mlx-server"), out.stderr


@pytest.fixture
def claude(server: Server, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """The real CLI with the variables that `docs/clients.md` shows, in an empty home. It works in
    the folder `project`."""
    cli = os.environ.get("CLAUDE_CLI")
    if not cli:
        pytest.skip("CLAUDE_CLI does not name Claude Code's program; .ci/run does")
    project, home = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    home.mkdir()
    clean = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "IS_SANDBOX": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }

    allowed = ["--permission-mode", "acceptEdits", "--allowedTools", "Bash Read Edit Write"]

    def run(
        *flags: str, exports: str = example("export "), **env: str
    ) -> subprocess.CompletedProcess:
        script = f'{exports.replace("http://localhost:11435", server.url)}\nexec "$@"'
        return subprocess.run(
            ["sh", "-c", script, "sh", cli, "-p", *flags, *allowed],
            cwd=project,
            env={**clean, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )

    return run


@pytest.mark.clients
def test_claude_code(server: Server, claude: Callable[..., subprocess.CompletedProcess]):
    """A real tool call, with and without --model, and a second turn."""

    def answer(*flags: str, **how: str) -> str:
        out = claude(*flags, **how)
        assert out.returncode == 0, out.stdout + out.stderr
        return out.stdout

    said = "The tool answered: hello-from-mlx"
    assert said in answer("run echo hello-from-mlx", "--model", "demo")
    seen = len(server.lines)
    assert "The tool answered: second" in answer("run echo second", "--model", "demo", "--continue")
    prompt, reused = map(int, server.wait_for(r"prompt (\d+), reused (\d+),", since=seen).groups())
    assert reused > 0.9 * prompt
    printed = example("--print-env").partition(" && ")[0]
    program = f"{shlex.join([sys.executable, str(ROOT / 'mlx_server.py')])} --port {server.port}"
    exports = printed.replace("python mlx_server.py", program)
    assert said in answer("run echo hello-from-mlx", exports=exports)


@pytest.mark.clients
def test_claude_code_edits_odd_blanks_byte_for_byte(
    claude: Callable[..., subprocess.CompletedProcess], tmp_path: Path
):
    """The model was never taught to edit: a schema of constants, sent beside a forced choice, makes
    it write just this call."""
    file = tmp_path / "project" / "odd.md"  # the CLI itself strips lines of other files
    before = "def f():\n\tif x:  \n\t \treturn 1\t \n\n    y = 2   \n \t"
    old, new = "\tif x:  \n\t \treturn 1\t \n", "\tif  x :\t\n \t return\t2  \n\t\n"
    file.write_bytes(before.encode())
    assert "The tool answered: 1" in claude("read odd.md", "--model", "demo", "--bare").stdout
    values = {"file_path": str(file), "old_string": old, "new_string": new}
    schema = {
        "type": "object",
        "required": [*values],
        "properties": {key: {"const": value} for key, value in values.items()},
        "additionalProperties": False,
    }
    tool = {"name": "Edit", "input_schema": schema}
    forced = {"tools": [tool], "tool_choice": {"type": "tool", "name": "Edit"}}
    flags = ["--model", "demo", "--bare", "--continue", "--max-turns", "1"]
    out = claude("edit it", *flags, CLAUDE_CODE_EXTRA_BODY=json.dumps(forced))
    assert file.read_bytes() == before.replace(old, new).encode(), out.stdout + out.stderr
