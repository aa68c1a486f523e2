"""Models are downloaded: Ollama's pull, with its official client, and the command line's."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ollama
import pytest
from conftest import ROOT, Server, example, until
from fake_hub import COMMIT, FakeHub, demo_files, digest, serving

from _mlx_server.inference.catalog.download import HubError, HubFailure, hub_error
from _mlx_server.inference.catalog.hub import Hub
from engine import Library

HUB_VARIABLES = ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HOME")


def environment(hub: str, cache: Path, **more: str) -> dict[str, str]:
    """Variables for a process that uses a hub and a cache in a folder of its own."""
    return {
        "HF_ENDPOINT": hub,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache.parent / "home"),
        "no_proxy": "127.0.0.1,localhost",
        **more,
    }


@pytest.fixture(scope="module")
def pulling(tmp_path_factory) -> Iterator[tuple[FakeHub, Server, Path]]:
    """A hub, a server that pulls from it, and that one's cache."""
    demo = demo_files()
    folder = tmp_path_factory.mktemp("pulling")
    repos = {
        "mlx-community/Tiny-1B-Instruct-4bit": demo,
        "mlx-community/Tiny-1B-Instruct-8bit": demo,
        "mlx-community/Tiny-VL-1B-4bit": demo,
        "org/own": {**demo, "README.md": b"#", "sub/more.json": b"{}", "x.py": b""},
        "org/gguf": {"config.json": b"{}", "x.gguf": b""},
        "org/new": {**demo, "config.json": b'{"model_type": "qwen4_exp"}'},
        "org/evil": {**demo, "../../evil.json": b"{}"},
    }
    with serving(repos) as hub:
        env = environment(hub.url, folder / "hub", HF_TOKEN="secret")
        server = Server("--state", str(folder / "presets.json"), env=env)
        yield hub, server, folder / "hub"
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.lines)


@pytest.fixture
def hub(pulling) -> FakeHub:
    pulling[0].reset()
    return pulling[0]


@pytest.fixture
def cache(pulling) -> Path:
    """The server's cache, empty."""
    shutil.rmtree(pulling[2], ignore_errors=True)
    return pulling[2]


@pytest.fixture
def puller(pulling, cache: Path) -> ollama.Client:
    return ollama.Client(pulling[1].url)


def names(client: ollama.Client) -> list[str]:
    return [model.model for model in client.list().models]


def test_a_pulled_model_answers_under_its_name_until_it_is_deleted(
    hub: FakeHub, puller: ollama.Client, cache: Path
):
    steps = list(puller.pull("tiny:1b", stream=True))
    assert [steps[0].status, steps[-1].status] == ["pulling manifest", "success"]
    weights = hashlib.sha256(hub.repos["org/own"]["model.safetensors"]).hexdigest()
    assert any(
        step.status == f"pulling {weights[:12]}" and step.completed == step.total for step in steps
    )
    assert puller.generate("tiny:1b", "say hello", options={"num_predict": 3}).response
    assert "mlx-community/Tiny-1B-Instruct-4bit:latest" in names(puller)
    tokens = {(path.startswith("/cdn/"), token) for _, path, _, token in hub.asked}
    assert tokens == {(True, None), (False, "Bearer secret")}
    asked = len(hub.asked)
    assert puller.pull("tiny:1b").status == "success"  # nothing to bring
    assert not any("/resolve/" in path for _, path, _, _ in hub.asked[asked:])
    puller.delete("mlx-community/Tiny-1B-Instruct-4bit")
    assert not list(cache.glob("models--*"))


def test_any_repo_is_pulled_by_its_id_and_only_what_a_model_needs(
    hub: FakeHub, puller: ollama.Client, cache: Path
):
    assert puller.pull("hf.co/org/own").status == "success"
    snapshot = cache / "models--org--own" / "snapshots" / COMMIT
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()} == (
        set(hub.repos["org/own"]) - {"README.md", "x.py"}
    )
    assert (cache / "models--org--own" / "refs" / "main").read_text() == COMMIT


@pytest.mark.slow
def test_what_is_logged_in_with_is_used(hub: FakeHub, cache: Path):
    (cache.parent / "home").mkdir(exist_ok=True)
    (cache.parent / "home" / "token").write_text("stored")
    try:
        assert pull(hub, cache, "pull", "org/own").wait(30) == 0
    finally:
        shutil.rmtree(cache.parent / "home")
    assert {token for _, _, _, token in hub.asked} == {None, "Bearer stored"}


@pytest.mark.slow
def test_a_connection_that_ends_early_is_made_again(
    hub: FakeHub, puller: ollama.Client, cache: Path
):
    hub.cut, hub.cuts = 5000, 1
    assert puller.pull("org/own").status == "success" and "org/own:latest" in names(puller)


@pytest.mark.slow
def test_a_pull_that_broke_off_goes_on_with_the_files_that_are_missing(
    hub: FakeHub, puller: ollama.Client, cache: Path
):
    hub.cut = 1_000_000
    with pytest.raises(ollama.ResponseError, match="pull again to go on"):
        puller.pull("org/own")
    assert "org/own:latest" not in names(puller)
    blobs = cache / "models--org--own" / "blobs"
    assert blobs.exists() and not list(blobs.glob("*.incomplete"))
    arrived = {file for file in hub.fetched() if file != "model.safetensors"}
    assert "tokenizer.json" in arrived and "config.json" not in arrived
    hub.reset()
    assert puller.pull("org/own").status == "success" and "org/own:latest" in names(puller)
    assert hub.fetched() == ["model.safetensors", "config.json"]


@pytest.mark.slow
def test_a_newer_revision_replaces_the_older_one_when_it_is_whole(
    hub: FakeHub, puller: ollama.Client, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    assert puller.pull("org/own").status == "success"
    library, snapshots = Library(), cache / "models--org--own" / "snapshots"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    newer = {**hub.repos["org/own"], "model.safetensors": bytes(8) + b"{}" + bytes(2_000_000)}
    monkeypatch.setitem(hub.repos, "org/own", newer)
    hub.commit, hub.cut = "d" * 40, 1_000_000
    with pytest.raises(ollama.ResponseError, match="pull again to go on"):
        puller.pull("org/own")
    assert (snapshots / hub.commit / "tokenizer.json").exists()
    assert library.resolve("org/own").path == snapshots / COMMIT
    hub.cut = None
    assert puller.pull("org/own").status == "success"
    assert library.resolve("org/own").path == snapshots / hub.commit


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_hanging_up_ends_a_pull(
    hub: FakeHub, pulling, puller: ollama.Client, cache: Path, xet: bool
):
    hub.pause, hub.xet = 0.05, xet
    connection = http.client.HTTPConnection("127.0.0.1", pulling[1].port)
    connection.request("POST", "/api/pull", json.dumps({"model": "org/own"}))
    answer = connection.getresponse()
    weights = digest("model.safetensors", hub.repos["org/own"]["model.safetensors"])
    part = f"models--org--own/blobs/{weights}.*.incomplete"
    while not list(cache.glob(part)):
        assert answer.readline()
    with pytest.raises(ollama.ResponseError, match="being downloaded already") as failure:
        puller.pull("org/own")
    assert failure.value.status_code == 409
    answer.close()
    connection.close()
    until(lambda: not list(cache.glob(part)), 30)
    hub.reset()
    assert "org/own:latest" not in names(puller)

    def succeeds() -> bool:
        try:
            return puller.pull("org/own").status == "success"
        except ollama.ResponseError as error:  # the first one has not let go of the repo
            assert error.status_code == 409
            return False

    until(succeeds, 30)


@pytest.mark.slow
def test_damaged_files_are_not_kept(hub: FakeHub, puller: ollama.Client, cache: Path):
    for damaged in ("model.safetensors", "tokenizer.json"):
        hub.damage = lambda name, content, bad=damaged: (
            bytes(1) + content[1:] if name == bad else content
        )
        with pytest.raises(ollama.ResponseError, match=f"{damaged} has arrived damaged"):
            puller.pull("org/own")
        assert "org/own:latest" not in names(puller)
        hub.reset()
        assert puller.pull("org/own").status == "success"
        assert damaged in hub.fetched()
        puller.delete("org/own")


def test_the_server_starts_without_the_library_that_downloads():
    slow = "sorted({'huggingface_hub', 'tqdm', 'httpx2'} & set(sys.modules))"
    code = f"import sys, mlx_server, engine; print({slow})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def pull(hub: FakeHub, cache: Path, *words: str, env: dict | None = None, **how):
    """`mlx_server.py ... pull ...`"""
    program = [sys.executable, str(ROOT / "mlx_server.py"), *words]
    env = {
        **{key: value for key, value in os.environ.items() if key not in HUB_VARIABLES},
        **environment(hub.url, cache, **(env or {})),
    }
    return subprocess.Popen(program, env=env, stdout=subprocess.PIPE, text=True, **how)


@pytest.mark.slow
def test_the_readmes_pull(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(hub.repos, "mlx-community/Qwen3-8B-8bit", hub.repos["org/own"])
    program = pull(hub, cache, *shlex.split(example("mlx_server.py pull"))[2:])
    assert "pulled mlx-community/Qwen3-8B-8bit" in program.communicate(timeout=30)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory, name, repo, why",
    [
        (
            "1GB",
            "tiny:1b",
            "mlx-community/Tiny-1B-Instruct-8bit",
            "8-bit fits into half of the 1.0 GB of memory that can be used",
        ),
        (
            "9MB",
            "tiny:1b",
            "mlx-community/Tiny-1B-Instruct-4bit",
            "8-bit takes 5 MB, more than half of the 9 MB",
        ),
        ("1GB", "tiny:1b-q4", "mlx-community/Tiny-1B-Instruct-4bit", "as asked"),
        ("1GB", "tiny-vl:1b", "mlx-community/Tiny-VL-1B-4bit", "there is no 8-bit version"),
    ],
)
def test_at_the_keyboard_memory_decides_the_quantisation_that_is_left_open(
    hub: FakeHub, cache: Path, memory: str, name: str, repo: str, why: str
):
    program = pull(hub, cache, "--memory", memory, "pull", name, stderr=subprocess.PIPE)
    out, told = program.communicate(timeout=30)
    assert program.returncode == 0 and out.startswith(f"pulling {repo}, 5 MB: {why}")
    assert out.endswith(f"mlx_server.py --model {repo}\n")
    assert re.fullmatch(r"100 %, 5\.20MB of 5\.20MB, [\d.]+[kM]B/s, 00:00 left\n", told)


@pytest.mark.slow
def test_at_the_keyboard_a_pull_draws_a_bar_and_what_fails_is_a_sentence(hub: FakeHub, cache: Path):
    leader, follower = os.openpty()
    hub.pause = 0.02
    program = pull(hub, cache, "pull", "org/own", stderr=follower)
    program.communicate(timeout=30)
    drawn = os.read(leader, 1 << 16).decode()
    assert program.returncode == 0
    assert re.search(
        r"\r\[#* *\] +\d\d? %, [\d.]+[kM]?B of 5\.20MB.*"
        r"\r\[#{24}\] 100 %, 5\.20MB of 5\.20MB, [\d.]+[kM]B/s, 00:00 left *\r\n$",
        drawn,
    )
    hub.reset()
    program = pull(hub, cache, "--memory", "2MB", "pull", "tiny:1b", stderr=subprocess.PIPE)
    _, told = program.communicate(timeout=30)
    assert "takes 5 MB, more than the 2 MB of memory that can be used; pull a smaller model" in told
    assert program.returncode == 1
    for file in (leader, follower):
        os.close(file)


@pytest.mark.slow
def test_at_the_keyboard_ctrl_c_ends_a_pull(hub: FakeHub, cache: Path):
    hub.pause = 5
    program = pull(hub, cache, "pull", "org/own", stderr=subprocess.PIPE)
    until(lambda: list(cache.glob("*/blobs/*.incomplete")), 30)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate(timeout=30)
    assert program.returncode == 130 and "the same command goes on from there" in told
    assert "Traceback" not in told and not list(cache.glob("*/blobs/*.incomplete"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("tiny:70b", "mlx-community has no model"),
        ("org/nope", "there is no such repo"),
        ("org/gguf", r"no MLX model: it holds GGUF weights \(x.gguf\)"),
        ("org/new", "cannot be used: mlx-lm .* does not know the model type 'qwen4_exp'"),
        ("org/evil", "makes no sense"),
        ("a b", "invalid model name"),
    ],
)
def test_what_cannot_be_pulled_is_an_error_with_a_status(
    hub: FakeHub, puller: ollama.Client, name: str, said: str
):
    with pytest.raises(ollama.ResponseError, match=said) as failure:
        list(puller.pull(name, stream=True))
    assert failure.value.status_code in (400, 404, 502)


@pytest.mark.parametrize(
    "answer, status, said",
    [
        (401, 404, "says 401 to org/own: there is no such repo, or it takes a token"),
        (403, 404, "says 403 to org/own: its owner gives access, and it takes a token"),
        (404, 404, "says 404 to org/own: there is no such repo"),
        (418, 502, "says 418 to org/own; pull again later"),
    ],
)
def test_a_hub_that_refuses_is_quoted(
    hub: FakeHub, puller: ollama.Client, answer: int, status: int, said: str
):
    hub.status = answer
    with pytest.raises(ollama.ResponseError, match=said) as failure:
        puller.pull("org/own")
    assert failure.value.status_code == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, said",
    [
        ({"HF_HUB_OFFLINE": "1"}, "is not asked while HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 failed: Connection refused;"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_an_error(hub: FakeHub, cache: Path, env: dict, said: str):
    program = pull(hub, cache, "pull", "org/own", env=env, stderr=subprocess.PIPE)
    _, told = program.communicate(timeout=60)
    assert program.returncode == 1 and said in told and "Traceback" not in told


class Mute(BaseHTTPRequestHandler):
    """Hangs up on every request, as it does that counts them."""

    def do_HEAD(self):
        self.server.asked.append(self.path)

    do_GET = do_HEAD


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny:1b", "org/own"])
def test_a_hub_that_never_answers_is_asked_once(tmp_path: Path, hub: FakeHub, name: str):
    with ThreadingHTTPServer(("127.0.0.1", 0), Mute) as mute:
        mute.asked = []
        threading.Thread(target=mute.serve_forever, args=(0.05,), daemon=True).start()
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{mute.server_port}"}
        program = pull(hub, tmp_path / "hub", "pull", name, env=env, stderr=subprocess.PIPE)
        _, told = program.communicate(timeout=60)
        mute.shutdown()
    assert program.returncode == 1 and "Server disconnected" in told and told.count("\n") == 1
    assert mute.asked == ["/"]


def test_a_disk_that_is_too_small_or_read_only_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
):
    from huggingface_hub import HfApi

    api = HfApi(hub.url)
    monkeypatch.setattr(Hub, "api", api)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(HubError, match=r"org/own needs \d{7} bytes, and 1000 are free") as failure:
        list(Hub(tmp_path / "hub").pull("org/own"))
    assert failure.value.reason is HubFailure.NO_SPACE
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be written to the model cache: ") as failure:
        list(Hub(tmp_path / "file").pull("org/own"))
    assert failure.value.reason is HubFailure.UNWRITABLE


@pytest.mark.parametrize(
    "error, reason, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "NO_SPACE", "no room for org/own"),
        (RuntimeError("I/O: No space left on device (28)"), "NO_SPACE", "no room for org/own"),
        (OSError(errno.EROFS, "Read-only file system"), "UNWRITABLE", "Read-only file system"),
        (OSError("Consistency check failed"), "UNREACHABLE", "pull again to go on"),
        (RuntimeError("CAS: timeout\nmore"), "UNREACHABLE", "failed: CAS: timeout; pull again"),
        (KeyError("sha"), "UNREACHABLE", "describes org/own in a way that makes no sense"),
        (HubError(HubFailure.BUSY, "as it is"), "BUSY", "^as it is$"),
    ],
)
def test_what_fails_is_one_sentence(error: Exception, reason: str, said: str):
    failure = hub_error(error, "org/own")
    assert failure.reason.name == reason and re.search(said, str(failure))


def test_a_repo_has_an_org_and_a_name(puller: ollama.Client):
    with pytest.raises(ollama.ResponseError, match="'a/b/c' names no repo") as failure:
        puller.pull("a/b/c")
    assert failure.value.status_code == 404
