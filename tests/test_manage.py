"""Models come, get names and go: Ollama's create, copy, delete and pull, with its official client
where that has the call."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import ollama
import pytest
from anthropic import Anthropic
from conftest import ROOT, Server, example
from test_http import ask
from test_library import add_repo

from _mlx_server.front.hub import Hub
from engine import Engine, EngineError, InvalidRequest, ModelNotFound, Preset

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("manage")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    (folder / "models").mkdir()
    server = Server(
        "--models-dir", str(folder / "models"), "--state", str(folder / "state" / "presets.json")
    )
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> ollama.Client:
    return ollama.Client(server.url)


def names(client: ollama.Client) -> list[str]:
    return [model.model for model in client.list().models]


def model_folder(folder: Path, name: str) -> Path:
    """A copy of the demo among the server's models."""
    return shutil.copytree(ROOT / "tests" / "demo", folder / "models" / name)


# ------------------------------------------------------------------ names of one's own


def test_a_created_name_answers_with_its_defaults_in_every_dialect(
    server: Server, client: ollama.Client
):
    defaults = {"num_predict": 2, "temperature": 0.5, "stop": ["END"]}
    steps = client.create("parrot", from_="demo", parameters=defaults, stream=True)
    assert [step.status for step in steps] == ["writing manifest", "success"]
    say = [{"role": "user", "content": "say one two three four five"}]
    assert client.chat("parrot", say).eval_count == 2 < client.chat("demo", say).eval_count
    assert client.chat("parrot", say, options={"num_predict": 4}).eval_count == 4
    assert (
        ask(server, "POST", "/v1/chat/completions", {"model": "parrot", "messages": say})[1].count(
            b'"length"'
        )
        == 1
    )
    assert "parrot:latest" in names(client) and client.ps().models[0].model == "demo:latest"
    other = Anthropic(base_url=server.url, api_key="x", _strict_response_validation=True)
    assert "parrot" in [model.id for model in other.models.list()]


def test_a_created_name_begins_conversations_unless_they_bring_a_system_message(
    server: Server, client: ollama.Client
):
    def read(model: str, *messages: dict) -> int:
        return client.chat(model, messages, options={"num_predict": 1}).prompt_eval_count

    def count(model: str, *messages: dict) -> int:
        body = {"model": model, "messages": messages}
        return json.loads(ask(server, "POST", "/v1/messages/count_tokens", body)[1])["input_tokens"]

    turns = [
        {"role": "user", "content": "who are you?"},
        {"role": "assistant", "content": "a bird"},
    ]
    client.create("bird", from_="demo", system="You are a bird.", messages=turns)
    fish = {"role": "system", "content": "You are a fish, not a bird."}
    assert read("bird", *HI) == read(
        "demo", {"role": "system", "content": "You are a bird."}, *turns, *HI
    )
    assert read("bird", fish, *HI) == read("demo", fish, *turns, *HI) != read("bird", *HI)
    assert count("bird", fish, *HI) == count("demo", fish, *turns, *HI)


def test_show_tells_what_was_created(client: ollama.Client):
    defaults = {"temperature": 0.25, "stop": ["a b"], "num_predict": 9}
    client.create("fish", from_="demo", system="You are a fish.", parameters=defaults)
    shown = client.show("fish")
    assert shown.parameters.split("\n") == [
        f"{'temperature':<30} 0.25",
        f"{'num_predict':<30} 9",
        f'{"stop":<30} "a b"',
    ]
    assert (
        shown.modelfile
        == 'FROM demo\nSYSTEM """You are a fish."""\nPARAMETER temperature 0.25\nPARAMETER num_predict 9\n'
        'PARAMETER stop "a b"\n'
    )
    assert (
        shown.template
        and "general.architecture" in shown.modelinfo
        and "completion" in shown.capabilities
    )


def test_what_is_created_from_a_created_name_inherits(client: ollama.Client):
    client.create("base", from_="demo", system="S", parameters={"temperature": 0.25, "top_k": 5})
    client.create("child", from_="base", parameters={"top_k": 7})
    assert client.show("child").parameters.split() == ["temperature", "0.25", "top_k", "7"]
    assert 'FROM demo\nSYSTEM """S"""' in client.show("child").modelfile


def test_a_copy_is_another_name_until_it_is_deleted(server: Server, client: ollama.Client):
    client.create("origin", from_="demo", system="O")
    client.copy("demo", "claude-copy:1b")
    client.copy("origin", "org/second")
    assert client.show("org/second").modelfile.count("SYSTEM") == 1
    assert {"claude-copy:1b", "org/second:latest"} < set(names(client))
    digests = {model.model: model.digest for model in client.list().models}
    assert digests["claude-copy:1b"] == digests["demo:latest"]
    client.delete("ORG/second:latest")
    assert "org/second:latest" not in names(client) and "origin:latest" in names(client)
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("org/second")


@pytest.mark.parametrize(
    "method, path, body, status, said",
    [
        ("POST", "/api/create", {"model": "x"}, 400, "neither 'from' or 'files' was specified"),
        ("POST", "/api/create", {"model": "x", "from": "nope"}, 404, "'nope' not found"),
        ("POST", "/api/create", {"model": "a b", "from": "demo"}, 400, "invalid model name"),
        ("POST", "/api/create", {"from": "demo"}, 400, "invalid model name"),
        (
            "POST",
            "/api/create",
            {"model": "x", "from": "demo", "template": "{{ .Prompt }}"},
            400,
            "'template' is not supported",
        ),
        *(
            (
                "POST",
                "/api/create",
                {"model": "x", "from": "demo", key: value},
                400,
                f"'{key}' is not supported",
            )
            for key, value in {
                "files": {"a": "b"},
                "adapters": {"a": "b"},
                "quantize": "q4_K_M",
                "renderer": "r",
                "parser": "p",
            }.items()
        ),
        (
            "POST",
            "/api/create",
            {"model": "x", "files": {"a": "sha256:0"}},
            400,
            "'files' is not supported",
        ),
        (
            "POST",
            "/api/create",
            {"model": "x", "from": "demo", "parameters": {"top_k": "many"}},
            400,
            "top_k",
        ),
        (
            "POST",
            "/api/create",
            {"model": "x", "from": "demo", "messages": HI},
            400,
            "the assistant's",
        ),
        (
            "POST",
            "/api/create",
            {"model": "Demo", "from": "demo"},
            400,
            "name of an installed model",
        ),
        ("POST", "/api/copy", {"source": "nope", "destination": "y"}, 404, "'nope' not found"),
        (
            "POST",
            "/api/copy",
            {"source": "demo", "destination": "/etc"},
            400,
            'destination \\"/etc\\" is invalid',
        ),
        ("DELETE", "/api/delete", {}, 400, "model is required"),
        ("DELETE", "/api/delete", {"name": "nope"}, 404, "'nope' not found"),
        ("DELETE", "/api/delete", {"name": "demo"}, 400, "not this server's to delete"),
        ("DELETE", "/api/delete", {"name": "claude-x"}, 400, "say its whole name: 'demo'"),
        ("POST", "/api/push", {"model": "demo"}, 400, "cannot be pushed"),
        ("POST", "/api/push", {}, 400, "model is required"),
        ("POST", "/api/blobs/sha256:00", "data", 400, "keeps no blobs"),
        ("HEAD", "/api/blobs/sha256:00", None, 404, ""),
    ],
)
def test_what_cannot_be_managed_is_said(
    server: Server, method: str, path: str, body: object, status: int, said: str
):
    response, text = ask(server, method, path, body)
    assert (response.status, said in text.decode()) == (status, True), text


def test_created_names_survive_a_restart_and_a_broken_file_is_not_overwritten(tmp_path: Path):
    state = tmp_path / "new" / "presets.json"
    with Engine(state=state) as engine:
        engine.keep(Preset("mine", "demo", system="S", stop=["x"]))
        engine.keep(Preset("gone", "demo"))
        engine.delete("gone")
    with Engine(state=state, aliases=[("cat*", "mine")]) as engine:
        assert engine.resolve("Mine:latest").name == engine.resolve("cat").name == "demo"
        assert (engine.preset("cat").system, engine.preset("gone")) == ("S", None)
    assert os.listdir(state.parent) == ["presets.json"]
    state.write_text('{"half": ')
    with pytest.raises(EngineError, match="repair or remove"):
        Engine(state=state)
    assert state.read_text() == '{"half": '


# ------------------------------------------------------------------ deleting


def test_a_deleted_model_is_unloaded_and_its_folder_gone(folder: Path, client: ollama.Client):
    path = model_folder(folder, "Spare-1B-4bit")
    client.generate("spare-1b-4bit")
    assert "Spare-1B-4bit:latest" in [model.model for model in client.ps().models]
    with pytest.raises(ollama.ResponseError, match="say its whole name: 'Spare-1B-4bit'"):
        client.delete("spare:1b")
    client.delete("Spare-1B-4bit:latest")
    assert not path.exists() and "Spare-1B-4bit:latest" not in names(client) + [
        m.model for m in client.ps().models
    ]


def test_only_models_inside_ones_own_folders_can_be_deleted(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    cached = add_repo(tmp_path, "org/cached").parent.parent
    outside = shutil.copytree(ROOT / "tests" / "demo", tmp_path / "outside")
    studio = shutil.copytree(outside, tmp_path / ".lmstudio" / "models" / "org" / "studio")
    single = shutil.copytree(outside, tmp_path / "single")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "linked").symlink_to(outside)
    kept = shutil.copytree(outside, tmp_path / "models" / "default")
    with Engine(str(kept), models_dirs=[tmp_path / "models", single, ROOT / "tests"]) as engine:
        for name in ("linked", "org/studio", "single", "demo", "default"):
            with pytest.raises(InvalidRequest, match="not this server's to delete"):
                engine.delete(name)
        engine.delete("org/cached")
        with pytest.raises(ModelNotFound):
            engine.delete("org/cached")
    assert not cached.exists() and all(
        path.joinpath("config.json").exists()
        for path in (outside, studio, single, kept, ROOT / "tests" / "demo")
    )


# ------------------------------------------------------------------ pulling


def test_the_hub_is_trusted_where_python_itself_knows_no_authorities(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
    assert not ssl.create_default_context().cert_store_stats()["x509_ca"]
    assert Hub(Path("/nonexistent"))._trust.cert_store_stats()["x509_ca"] > 50


class FakeHub(ThreadingHTTPServer):
    """A hub of repos {name: {file: content}}: an API that lists them, and files behind a redirect.
    `asked` are paths, with their Range and Authorization; `cut` is how many bytes of a file arrive
    before the connection ends."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos, self.cut, self.ranges = repos, None, True
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        url, hub = urlsplit(self.path), self.server
        hub.asked.append((url.path, self.headers["Range"], self.headers["Authorization"]))
        parts = url.path.split("/")
        if url.path == "/api/models":
            search = dict(parse_qsl(url.query))["search"].lower()
            return self.give([{"id": repo} for repo in hub.repos if search in repo.lower()])
        if parts[1] == "cdn":
            return self.send_file(hub.repos["/".join(parts[2:4])]["/".join(parts[4:])])
        repo = "/".join(parts[3:5] if parts[1] == "api" else parts[1:3])
        if repo not in hub.repos:
            return self.send_error(401)
        if parts[1] == "api":
            return self.give(
                {
                    "sha": "c" * 40,
                    "siblings": [
                        {
                            "rfilename": name,
                            "size": len(data),
                            "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                            **(
                                {"lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
                                if name.endswith(".safetensors")
                                else {}
                            ),
                        }
                        for name, data in hub.repos[repo].items()
                    ],
                }
            )
        self.send_response(302)
        self.send_header("Location", f"{hub.url}/cdn/{repo}/{'/'.join(parts[5:])}")
        self.end_headers()

    def give(self, body: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def send_file(self, data: bytes) -> None:
        wanted = (
            re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if self.server.ranges
            else None
        )
        self.send_response(206 if wanted else 200)
        rest = data[int(wanted[1]) if wanted else 0 :]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def pulling(tmp_path_factory) -> Iterator[tuple[FakeHub, Server, Path]]:
    """A hub, a server that pulls from it, and that one's cache."""
    demo = {
        path.name: path.read_bytes()
        for path in (ROOT / "tests" / "demo").iterdir()
        if path.suffix != ".py"
    }
    folder = tmp_path_factory.mktemp("pulling")
    hub = FakeHub(
        {
            "mlx-community/Tiny-1B-Instruct-4bit": demo,
            "mlx-community/Tiny-1B-Instruct-8bit": demo,
            "mlx-community/Tiny-VL-1B-4bit": demo,
            "org/own": {**demo, "README.md": b"#", "sub/more.json": b"{}", "x.py": b""},
            "org/gguf": {"config.json": b"{}", "x.gguf": b""},
            "org/evil": {**demo, "../../evil.json": b"{}"},
        }
    )
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    server = Server(
        "--state",
        str(folder / "presets.json"),
        env={
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "secret",
            "HF_HUB_CACHE": str(folder / "hub"),
            "no_proxy": "127.0.0.1",
        },
    )
    yield hub, server, folder / "hub"
    assert server.stop() == 0
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(pulling) -> FakeHub:
    hub = pulling[0]
    hub.asked, hub.cut, hub.ranges = [], None, True
    return hub


@pytest.fixture
def cache(pulling) -> Path:
    """The server's cache, empty."""
    shutil.rmtree(pulling[2], ignore_errors=True)
    return pulling[2]


@pytest.fixture
def puller(pulling, cache: Path) -> ollama.Client:
    return ollama.Client(pulling[1].url)


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
    tokens = {(path.startswith("/cdn/"), token) for path, _, token in hub.asked}
    assert tokens == {(True, None), (False, "Bearer secret")}
    asked = len(hub.asked)
    assert puller.pull("tiny:1b").status == "success"  # nothing to bring
    assert not any("/resolve/" in path for path, _, _ in hub.asked[asked:])
    puller.delete("mlx-community/Tiny-1B-Instruct-4bit")
    assert list(cache.iterdir()) == []


def test_any_repo_is_pulled_by_its_id_and_only_what_a_model_needs(
    hub: FakeHub, puller: ollama.Client, cache: Path
):
    assert puller.pull("hf.co/org/own").status == "success"
    snapshot = cache / "models--org--own" / "snapshots" / ("c" * 40)
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()} == (
        {name for name in hub.repos["org/own"]} - {"README.md", "x.py"}
    )
    assert (cache / "models--org--own" / "refs" / "main").read_text() == "c" * 40


@pytest.mark.parametrize("ranges", [True, False])
def test_a_pull_that_broke_off_goes_on_where_it_was(
    hub: FakeHub, puller: ollama.Client, cache: Path, ranges: bool
):
    hub.cut = 5000
    with pytest.raises(ollama.ResponseError, match="pull again to go on"):
        puller.pull("org/own")
    assert "org/own:latest" not in names(puller)
    begun = list((cache / "models--org--own" / "blobs").glob("*.incomplete"))
    assert [path.stat().st_size for path in begun] == [5000]
    hub.cut, hub.ranges = None, ranges
    assert puller.pull("org/own").status == "success" and "org/own:latest" in names(puller)
    # At the hub, and where it leads
    assert [wanted for _, wanted, _ in hub.asked if wanted] == ["bytes=5000-"] * 2


def test_damaged_files_are_not_kept(hub: FakeHub, puller: ollama.Client, cache: Path):
    assert puller.pull("org/own").status == "success"
    puller.delete("org/own")
    blobs = cache / "models--org--own" / "blobs"
    blobs.mkdir(parents=True)
    (
        blobs
        / f"{hashlib.sha256(hub.repos['org/own']['model.safetensors']).hexdigest()}.incomplete"
    ).write_bytes(b"wrong")
    with pytest.raises(ollama.ResponseError, match="damaged"):
        puller.pull("org/own")
    assert "org/own:latest" not in names(puller) and puller.pull("org/own").status == "success"


def pull(hub: FakeHub, cache: Path, *words: str, **how) -> subprocess.Popen:
    """`mlx_server.py ... pull ...`"""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "no_proxy": "127.0.0.1",
    }
    program = [sys.executable, str(ROOT / "mlx_server.py"), *words]
    return subprocess.Popen(program, env=env, stdout=subprocess.PIPE, text=True, **how)


def test_the_readmes_pull(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(hub.repos, "mlx-community/Qwen3-8B-8bit", hub.repos["org/own"])
    program = pull(hub, cache, *shlex.split(example("mlx_server.py pull"))[2:])
    assert "pulled mlx-community/Qwen3-8B-8bit" in program.communicate(timeout=30)[0]


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
    assert re.fullmatch(r"100 %, 5 MB of 5 MB, \d+ MB/s, 0 s left\n", told)


def test_at_the_keyboard_a_pull_draws_a_bar_and_what_fails_is_a_sentence(hub: FakeHub, cache: Path):
    leader, follower = os.openpty()
    program = pull(hub, cache, "pull", "org/own", stderr=follower)
    program.communicate(timeout=30)
    drawn = os.read(leader, 1 << 16).decode()
    assert program.returncode == 0
    assert re.search(
        r"\r\[#* *\] +\d\d? %, \d MB of 5 MB.*\r\[#{24}\] 100 %, 5 MB of 5 MB, \d+ MB/s, 0 s left\x1b\[K\r\n$",
        drawn,
    )
    program = pull(hub, cache, "--memory", "2MB", "pull", "tiny:1b", stderr=subprocess.PIPE)
    _, told = program.communicate(timeout=30)
    assert "takes 5 MB, more than the 2 MB of memory that can be used; pull a smaller model" in told
    assert program.returncode == 1
    for file in (leader, follower):
        os.close(file)


@pytest.mark.parametrize(
    "name, said",
    [
        ("tiny:70b", "mlx-community has no model"),
        ("org/nope", "there is no such repo"),
        ("org/gguf", r"no MLX model: it holds GGUF weights \(x.gguf\)"),
        ("org/evil", "makes no sense"),
        ("a b", "invalid model name"),
    ],
)
def test_what_cannot_be_pulled_is_an_error_with_a_status(
    puller: ollama.Client, name: str, said: str
):
    with pytest.raises(ollama.ResponseError, match=said) as failure:
        list(puller.pull(name, stream=True))
    assert failure.value.status_code in (400, 404, 502)
