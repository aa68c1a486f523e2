"""The server among many clients: what it says when it is full, silent or told to end, and whom it
serves first; and as a service of the system, with its files, logs, signals and clocks."""

from __future__ import annotations

import http.client
import json
import logging
import os
import plistlib
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Server
from models import build_model
from soak import figure
from test_http import ask

from _mlx_server.front.logs import log_file
from _mlx_server.wire.anthropic import AnthropicMessages
from engine import Engine, Text, Usage
from mlx_server import MLXServer

SLOW = "slow " * 240  # enough words to be busy with for a while
# In the server's process no token is decoded while the file $HOLD is there; the file $HOLD.reached
# says that one would have been
HELD_DECODING = """
import os, time
from _mlx_server.inference.decoding.decode_batch import DecodeBatch

step = DecodeBatch.step

def held_step(self, *drafters):
    while os.path.exists(os.environ["HOLD"]):
        open(os.environ["HOLD"] + ".reached", "w").close()
        time.sleep(0.02)
    return step(self, *drafters)

DecodeBatch.step = held_step
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes its time to read."""
    from models import CONFIGS

    config = {
        **CONFIGS["qwen2"],
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
    }
    return build_model("qwen2", tmp_path_factory.mktemp("slow") / "slow", config=config)


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """The file that stops the decoding of the test's servers as long as it exists. It makes a test
    independent of the speed of the machine: what has begun is certainly still running."""
    (tmp_path / "sitecustomize.py").write_text(HELD_DECODING)
    return tmp_path / "hold"


@pytest.fixture
def start(model: Path, hold: Path) -> Iterator:
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        env = {"PYTHONPATH": f"{hold.parent}:{ROOT}", "HOLD": str(hold)}
        servers.append(Server("--model", str(model), *flags, env=env))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


class Call:
    """A request that has been sent; the answer's status and headers are there."""

    def __init__(
        self,
        server: Server,
        path: str,
        text: str,
        *,
        stream: bool = True,
        headers: dict | None = None,
        **fields,
    ):
        body = {
            "model": "slow",
            "messages": [{"role": "user", "content": text}],
            "stream": stream,
            **fields,
        }
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self.connection.request("POST", path, json.dumps(body), headers or {})
        self.response: http.client.HTTPResponse | None = None

    def wait(self) -> http.client.HTTPResponse:
        self.response = self.response or self.connection.getresponse()
        return self.response

    def lines(self) -> Iterator[str]:
        return (line.decode().strip() for line in self.wait())

    def hang_up(self) -> None:
        if self.response is not None:
            self.response.close()
        self.connection.close()


def messages(server: Server, text: str, max_tokens: int = 4, **more) -> Call:
    return Call(server, "/v1/messages", text, max_tokens=max_tokens, **more)


def chat(server: Server, text: str, **more) -> Call:
    return Call(server, "/api/chat", text, **more)


def get(server: Server, path: str, headers: dict | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def until(server: Server, name: str, value: int, headers: dict | None = None) -> None:
    """Waits for a figure of /metrics to have a value."""
    deadline = time.monotonic() + 60
    while f"\nmlx_server_{name} {value}\n" not in get(server, "/metrics", headers)[1]:
        assert time.monotonic() < deadline, f"{name} never was {value}"
        time.sleep(0.02)


def until_held(hold: Path) -> None:
    """Waits for the server to decode, which `hold` prevents: from then on its engine stands still
    until the file is removed."""
    deadline = time.monotonic() + 60
    while not hold.with_name("hold.reached").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_it_ends(server: Server) -> None:
    """Waits for the server to say that it takes nothing new."""
    deadline = time.monotonic() + 60
    while get(server, "/health")[0] != 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------ a full house


@pytest.mark.slow
def test_a_full_house_is_refused_politely_in_each_dialect_and_hanging_up_makes_room(
    start, hold: Path
):
    server = start("--max-queue", "1")
    hold.touch()
    running = messages(server, "first")
    running.wait()
    until_held(hold)
    until(server, "running_requests", 1)
    waiting = messages(server, "second")
    waiting.wait()
    refused = messages(server, "hi").wait()
    assert refused.status == 529 and int(refused.headers["retry-after"]) > 0
    assert json.load(refused)["error"]["type"] == "overloaded_error"
    refused = chat(server, "hi").wait()
    assert refused.status == 503
    assert json.load(refused) == {
        "error": "server busy, please try again.  maximum pending requests exceeded"
    }
    waiting.hang_up()
    until(server, "waiting_requests", 0)
    assert messages(server, "hi").wait().status == 200
    hold.unlink()
    assert "event: message_stop" in running.lines()


# ------------------------------------------------------------------ never silent


@pytest.mark.slow
def test_no_stream_is_ever_silent_for_long(start):
    server = start()
    calls = {
        "/v1/messages": messages(server, SLOW * 3),
        "/api/chat": chat(server, SLOW * 2, options={"num_predict": 4}),
    }

    def listen(path: str) -> tuple[float, float, list[str]]:
        calls[path].wait()
        began = last = time.monotonic()
        longest, lines = 0.0, []
        for line in calls[path].lines():
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            lines.append(line)
        return last - began, longest, lines

    with ThreadPoolExecutor() as pool:
        heard = dict(zip(calls, pool.map(listen, calls), strict=True))
    for path, (whole, longest, lines) in heard.items():
        beats = [
            line for line in lines if line == "event: ping" or '"content":""},"done":false' in line
        ]
        assert longest <= 6, path
        assert len(beats) >= whole // 6
    assert "event: message_stop" in heard["/v1/messages"][2]
    assert json.loads(heard["/api/chat"][2][-1])["done"] is True


def test_a_long_lull_is_bridged_by_events_that_every_client_counts():
    reply = AnthropicMessages(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    )

    class Accepted:
        id, prompt_tokens, cached_tokens, usage = "1", 5, 0, Usage(5)

    reply.open(Accepted())
    assert reply.ping(10) == [{"type": "ping"}]
    first = reply.ping(200)
    assert first[0] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    empty = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ""}}
    assert first[-1] == empty and reply.ping(200) == [empty]
    assert reply.event(Text("hello"))[-1]["delta"]["text"] == "hello"


# ------------------------------------------------------------------ whom it serves first


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, headers",
    [
        ((), {"x-priority": "high"}),
        (("--priority", "anthropic=low"), {}),
        (("--api-key", "agent=low", "--api-key", "bot=high"), {"x-api-key": "bot"}),
    ],
)
def test_an_important_client_does_not_wait_for_the_others(
    start, hold: Path, flags: tuple[str, ...], headers: dict
):
    server = start(*flags)
    hold.touch()
    key = {"x-api-key": "agent"}
    first = Call(server, "/api/generate", "", prompt="hi", headers=key, options={"num_predict": 2})
    until_held(hold)
    agents = [messages(server, f"{n} " + SLOW, headers=key) for n in range(3)]
    bot = chat(server, "slow " * 50, headers=headers, options={"num_predict": 2})
    until(server, "waiting_requests", 4, headers)
    hold.unlink()
    assert json.loads([*first.lines()][-1])["done"] is True
    assert json.loads([*bot.lines()][-1])["done"] is True
    server.wait_for(r"/api/chat slow: prompt")
    assert not any(re.search(r"/v1/messages slow: prompt", line) for line in server.lines)
    for agent in agents:
        agent.hang_up()


@pytest.mark.slow
def test_a_key_bounds_the_priority_of_its_holder_and_nonsense_is_refused(start):
    server = start("--api-key", "agent=low", "--api-key", "plain")
    assert (
        messages(server, "hi", headers={"x-api-key": "agent", "x-priority": "high"}).wait().status
        == 200
    )
    refused = messages(server, "hi", headers={"x-api-key": "plain", "x-priority": "urgent"}).wait()
    assert refused.status == 400 and "x-priority" in json.load(refused)["error"]["message"]
    assert messages(server, "hi", headers={"x-api-key": "nobody"}).wait().status == 401


# ------------------------------------------------------------------ watching it, and ending it


def test_metrics_count_what_was_done(start):
    server = start()
    list(messages(server, "hi", max_tokens=3).lines())
    list(chat(server, "hi", options={"num_predict": 2}).lines())
    list(Call(server, "/api/generate", "").lines())  # only loads the model
    assert messages(server, "hi", model="nobody").wait().status == 404
    server.wait_for("nobody")
    assert figure(server.url, 'http_requests_total{dialect="anthropic",status="200"}') == 1
    assert figure(server.url, 'http_requests_total{dialect="anthropic",status="404"}') == 1
    until(server, 'generations_total{ending="length"}', 2)
    until(server, 'generations_total{ending="load"}', 1)
    assert figure(server.url, "completion_tokens_total") == 5
    assert 0 < figure(server.url, "cached_tokens_total") < figure(server.url, "prompt_tokens_total")
    assert figure(server.url, "time_to_first_token_seconds_count") == 2
    assert 0 < figure(server.url, "memory_bytes") < figure(server.url, "memory_limit_bytes")
    for line in get(server, "/metrics")[1].splitlines():
        assert re.fullmatch(
            r"# (HELP|TYPE) mlx_server_\w+ .+|mlx_server_\w+(\{[^{}]*\})? [0-9.e+-]+", line
        ), line


@pytest.mark.slow
def test_a_server_told_to_end_finishes_what_it_has_begun_and_takes_nothing_new(start, hold: Path):
    server = start("--drain", "1h")
    hold.touch()
    running = messages(server, "hi", max_tokens=30)
    running.wait()
    until_held(hold)
    server.process.terminate()
    until_it_ends(server)
    assert messages(server, "too late").wait().status == 529
    hold.unlink()
    assert "event: message_stop" in running.lines()
    assert server.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("signals, flags", [(1, ("--drain", "0")), (2, ("--drain", "1h"))])
def test_what_cannot_be_finished_ends_with_an_error_that_clients_understand(
    start, signals: int, flags: tuple[str, ...]
):
    server = start(*flags)
    running = messages(server, "hi", max_tokens=30000)
    lines = running.lines()
    assert next(line for line in lines if "text_delta" in line)
    if signals == 2:
        server.process.terminate()
        until_it_ends(server)
    server.process.terminate()
    assert "overloaded_error" in [*lines][-2]
    assert server.process.wait(60) == 0


# ------------------------------------------------------------------ a service

# https://developer.apple.com/library/archive/documentation/MacOSX/Conceptual/BPSystemStartup, `man
# launchd.plist`
APPLES = set(
    """
Label Disabled UserName GroupName inetdCompatibility LimitLoadToHosts LimitLoadFromHosts
LimitLoadToSessionType LimitLoadToHardware LimitLoadFromHardware Program BundleProgram
ProgramArguments EnableGlobbing EnableTransactions EnablePressuredExit OnDemand ServiceIPC
KeepAlive RunAtLoad RootDirectory WorkingDirectory EnvironmentVariables Umask TimeOut
ExitTimeOut ThrottleInterval InitGroups WatchPaths QueueDirectories StartOnMount StartInterval
StartCalendarInterval StandardInPath StandardOutPath StandardErrorPath Debug WaitForDebugger
SoftResourceLimits HardResourceLimits Nice ProcessType AbandonProcessGroup LowPriorityIO
LowPriorityBackgroundIO MaterializeDatalessFiles LaunchOnlyOnce MachServices Sockets
LaunchEvents HopefullyExitsLast HopefullyExitsFirst SessionCreate LegacyTimers
AssociatedBundleIdentifiers""".split()  # noqa: SIM905
)


def clean(home: Path) -> dict[str, str]:
    """The environment that a service manager gives to a user's services."""
    return {"HOME": str(home), "PATH": "/usr/bin:/bin"}


def printed(home: Path, *flags: str) -> str:
    """What the program prints when it is started in a home directory."""
    out = subprocess.run(
        [sys.executable, str(ROOT / "mlx_server.py"), *flags],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean(home), "HF_HUB_CACHE": str(home / "hub")},
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


# In the server's process every decoding step fails as on a Mac whose GPU takes no more work
REFUSED_GPU = """
from _mlx_server.inference.decoding.decode_batch import DecodeBatch

def step(self, *_):
    raise RuntimeError(
        "[METAL] Command buffer execution failed: "
        "Ignored (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
    )

DecodeBatch.step = step
"""


@pytest.mark.slow
def test_a_server_whose_gpu_takes_no_more_work_ends_to_be_started_anew(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(REFUSED_GPU)
    server = Server("--model", "demo", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    body = {"model": "demo", "prompt": "hi", "stream": False}
    assert ask(server, "POST", "/api/generate", body)[0].status == 500
    assert server.process.wait(60) == 1


def test_an_engine_that_has_failed_ends_its_server_and_not_the_program_around_it():
    class BrokenEngine:
        broken, closed = True, False

        def drain(self, seconds: float) -> None:
            pass

        def close(self, grace: float) -> None:
            self.closed = True

    engine = BrokenEngine()
    server = MLXServer(("127.0.0.1", 0), engine)
    server.serve_forever(poll_interval=0.01)
    server.wait_stopped()
    assert engine.closed and server.socket.fileno() == -1


class Service:
    """A server started by a whole command, that logs to a file or, without one, to `stderr`."""

    def __init__(
        self,
        command: list[str],
        home: Path,
        log: Path,
        env: dict | None = None,
        stderr: int = subprocess.DEVNULL,
    ):
        self.process = subprocess.Popen(
            command, cwd="/", env={**clean(home), **(env or {})}, stderr=stderr
        )
        deadline, found = time.monotonic() + 60, None
        while not found:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
            found = re.search(
                r"listening on http://\S+:(\d+)", log.read_text("utf-8") if log.exists() else ""
            )
        self.port = int(found[1])

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0


FLAGS = [
    "--port",
    "0",
    "--models-dir",
    "my models",
    "--cache-dir=~/kv",
    "--state",
    "./names.json",
    "--api-key-file",
    "keys",
    "--alias",
    "near=./my models/near",
    "--alias=far=demo",
    "--priority",
    "anthropic=low",
    "--drain",
    "60s",
]


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A home directory with a model and a file of keys."""
    build_model("qwen2", tmp_path / "my models" / "near")
    (tmp_path / "keys").write_text("secret")
    (tmp_path / "keys").chmod(0o600)
    return tmp_path


@pytest.mark.slow
def test_a_launchd_job_starts_the_server_from_anywhere_shows_no_keys_and_its_log_may_be_truncated(
    user: Path,
):
    text = printed(user, "--print-launchd", *FLAGS)
    job = plistlib.loads(text.encode())
    assert set(job) <= APPLES and "secret" not in text
    log = user / "Library" / "Logs" / "mlx-server.log"
    assert job["ProgramArguments"] == [
        sys.executable,
        str(ROOT / "mlx_server.py"),
        "--port",
        "0",
        "--models-dir",
        f"{user}/my models",
        "--cache-dir",
        f"{user}/kv",
        "--state",
        f"{user}/names.json",
        "--api-key-file",
        f"{user}/keys",
        "--alias",
        f"near={user}/my models/near",
        "--alias",
        "far=demo",
        "--priority",
        "anthropic=low",
        "--drain",
        "60s",
        "--log-file",
        str(log),
    ]
    assert job["RunAtLoad"] is True and job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ExitTimeOut"] > 60 + 5
    assert job["StandardErrorPath"].startswith(f"{user}/Library/Logs/")
    with Service(job["ProgramArguments"], user, log, job["EnvironmentVariables"]) as service:
        assert ask(service, "GET", "/api/tags")[0].status == 401
        for name in ("near", "far"):
            assert (
                ask(service, "POST", "/api/show", {"model": name}, {"x-api-key": "secret"})[
                    0
                ].status
                == 200
            )
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d mlx-server", log.read_text())
        os.truncate(log, 0)
        service.process.send_signal(signal.SIGHUP)
        assert ask(service, "GET", "/hung/up")[0].status == 401
    assert "GET /hung/up -> 401" in log.read_text().splitlines()[0]


@pytest.mark.slow
def test_a_systemd_unit_starts_the_server_whatever_the_arguments_are(user: Path):
    odd = 'we"ird\\d %h $HOME ${HOME} é\\'
    unit = printed(user, "--print-systemd", "--alias", f"{odd}=demo", "--log-file", "log", *FLAGS)
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert lines["Restart"] == "on-failure" and int(lines["TimeoutStopSec"]) > 60 + 5
    quoted, plain = re.compile(r'"(?:[^"\\]|\\["\\])*"'), r"(?:[^$%]|\$\$|%%)*"
    for line in (lines["ExecStart"], lines["Environment"]):
        assert " ".join(quoted.findall(line)) == line
    assert re.fullmatch(plain, lines["ExecStart"])
    if shutil.which("systemd-analyze"):
        (user / "x.service").write_text(unit)
        assert (
            subprocess.run(
                ["systemd-analyze", "--user", "verify", user / "x.service"],
                env={**clean(user), "XDG_RUNTIME_DIR": str(user)},
            ).returncode
            == 0
        )
    command = [
        word.replace("$$", "$").replace("%%", "%") for word in shlex.split(lines["ExecStart"])
    ]
    assert command[2:6] == ["--alias", f"{odd}=demo", "--log-file", f"{user}/log"]
    name, _, value = shlex.split(lines["Environment"])[0].partition("=")
    with Service(command, user, user / "log", {name: value}) as service:
        assert (
            ask(service, "POST", "/api/show", {"model": odd}, {"x-api-key": "secret"})[0].status
            == 200
        )


def test_a_log_file_is_bounded(tmp_path: Path):
    handler = log_file(str(tmp_path / "log"))
    for number in range(60):
        handler.emit(logging.makeLogRecord({"msg": f"{number} {'a' * 2**20}"}))
    handler.close()
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1", "log.2", "log.3"}
    assert all(path.stat().st_size <= 10 * 2**20 for path in tmp_path.iterdir())
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("59 ")


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    out = subprocess.run(
        [sys.executable, str(ROOT / "mlx_server.py"), "--log-file", str(tmp_path / "file" / "log")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and "cannot log to" in out.stderr


@pytest.mark.slow
def test_a_closed_stderr_does_no_harm(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "mlx_server.py"), "--port", "0", "--verbose"],
        cwd="/",
        env=clean(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (found := re.search(r"listening on http://\S+:(\d+)", process.stderr.readline())):
        assert process.poll() is None
    process.stderr.close()
    process.port = int(found[1])
    for path in ("/", "/api/nope", "/v1/models"):
        assert ask(process, "GET", path)[0].status in (200, 404)
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_closed_terminal_ends_the_server(tmp_path: Path):
    terminal, stderr = pty.openpty()
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "mlx_server.py"), "--port", "0", "--log-file", str(log)]
    service = Service(command, tmp_path, log, stderr=stderr)
    os.close(stderr)
    os.close(terminal)
    service.process.send_signal(signal.SIGHUP)
    assert service.process.wait(60) == 0


# ------------------------------------------------------------------ clocks


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + ahead)


def test_a_clock_set_forward_unloads_nothing_and_shows_in_what_is_told(
    monkeypatch: pytest.MonkeyPatch, model: Path
):
    with Engine(models_dirs=[model]) as engine:
        list(engine.chat("say hi", model="demo", keep_alive=3600.0))
        told = engine.loaded()[0].expires
        set_clock(monkeypatch, 86400.0)
        engine.unload("slow")  # it looks at all of them
        assert [one.model.name for one in engine.loaded()] == ["demo"]
        assert engine.loaded()[0].expires - told > 86000


@pytest.mark.slow
def test_a_clock_set_back_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    with Engine() as engine:
        list(engine.chat("say hi", model="demo", keep_alive=0.3))
        set_clock(monkeypatch, -86400.0)
        deadline = time.monotonic() + 60
        while engine.loaded():
            assert time.monotonic() < deadline
            time.sleep(0.02)
