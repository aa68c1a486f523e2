"""Models get names and go: Ollama's create, copy and delete, with its official client where that
has the call."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ollama
import pytest
from anthropic import Anthropic
from conftest import ROOT, Server
from model_folders import add_repo
from test_http import ask

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
    assert shown.modelfile.splitlines() == [
        "FROM demo",
        'SYSTEM """You are a fish."""',
        "PARAMETER temperature 0.25",
        "PARAMETER num_predict 9",
        'PARAMETER stop "a b"',
    ]
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
    client.copy("demo", "my-copy:1b")
    client.copy("origin", "org/second")
    assert client.show("org/second").modelfile.count("SYSTEM") == 1
    assert {"my-copy:1b", "org/second:latest"} < set(names(client))
    digests = {model.model: model.digest for model in client.list().models}
    assert digests["my-copy:1b"] == digests["demo:latest"]
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


def test_a_model_that_mlx_lm_does_not_know_is_a_400_and_listed_with_the_reason(
    server: Server, folder: Path, client: ollama.Client
):
    config = model_folder(folder, "New-7B-4bit") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "qwen4_exp"}))
    reason = "does not know the model type 'qwen4_exp'"
    for path in ("/api/chat", "/v1/messages", "/v1/chat/completions"):
        body = {"model": "new:7b", "messages": HI, "max_tokens": 5, "stream": True}
        response, text = ask(server, "POST", path, body)
        assert response.status == 400 and reason in text.decode()
    assert "New-7B-4bit:latest" not in names(client)
    program = [sys.executable, str(ROOT / "mlx_server.py"), "list"]
    listed = subprocess.run(
        [*program, "--models-dir", str(folder / "models")], capture_output=True, text=True
    )
    assert "model 'New-7B-4bit' cannot be loaded: mlx-lm" in listed.stdout.splitlines()[-1]
    assert reason in listed.stdout and listed.returncode == 0
    shutil.rmtree(config.parent)


def test_only_models_inside_ones_own_folders_can_be_deleted(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
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
