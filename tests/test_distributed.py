"""One model on several machines: `mlx.launch`'s processes answer as one does, and end together."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from multiprocessing import connection
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import mlx.core as mx
import pytest
from conftest import ROOT, Server
from models import CONFIGS, build_model
from vision_models import PICTURES, build_vision_model, png

from _mlx_server.inference.images.images import UNSEEN
from _mlx_server.inference.ranks import accept_peers
from mlx_server import main

# Which neither two nor four can share evenly
CONFIG = {**CONFIGS["qwen2"], "num_key_value_heads": 4, "num_hidden_layers": 5}
SYSTEM = "You are one of many. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("qwen2", tmp_path_factory.mktemp("model") / "wide", config=CONFIG)


class Group:
    """Processes as `mlx.launch --backend ring` starts them. `server` is rank 0, the only one that
    listens."""

    def __init__(self, folder: Path, size: int, *flags: str):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        for one in sockets:
            one.close()
        envs = [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(size)]
        command = [sys.executable, str(ROOT / "mlx_server.py"), *flags]
        self.followers = [
            subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, **env})
            for env in envs[1:]
        ]
        self.server = Server(*flags, env=envs[0])

    def stop(self) -> list[int]:
        """Tells rank 0 to end; returns the exit status of each rank."""
        return [self.server.stop(), *(follower.wait(20) for follower in self.followers)]

    def kill(self) -> None:
        for process in [self.server.process, *self.followers]:
            process.kill()
            process.wait()


def send(server: Server, text: str, **fields: Any) -> HTTPResponse:
    """The answer of Anthropic's API."""
    body = {
        "model": "default",
        "max_tokens": 3,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": text}],
        **fields,
    }
    return urlopen(Request(f"{server.url}/v1/messages", json.dumps(body).encode()), timeout=60)


def ask(server: Server, text: str, **fields: Any) -> dict:
    with send(server, text, **fields) as answer:
        return json.load(answer)


def conversation(server: Server) -> list:
    """Answers to one client, to two at once, and to the first again, with what this one takes from
    the prompt cache."""
    first = ask(server, "number 0")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda n: ask(server, f"number {n}", max_tokens=n), (2, 3)))
    again = ask(server, "number 0, once more")
    assert again["usage"]["cache_read_input_tokens"]
    return [first["content"], *(one["content"] for one in both), again["content"], again["usage"]]


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[list]:
    server = Server("--model", str(model))
    yield conversation(server)
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--pipeline"]])
def test_two_processes_answer_as_one_does(
    flags: list[str], model: Path, alone: list, tmp_path: Path
):
    group = Group(tmp_path, 2, "--model", str(model), *flags)
    try:
        assert conversation(group.server) == alone
        assert group.stop() == [0, 0]
    finally:
        group.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind, flags", [("qwen3_5", []), ("ministral3", ["--pipeline"])])
def test_two_processes_that_could_see_get_a_note(kind: str, flags: list[str], tmp_path: Path):
    model = build_vision_model(kind, tmp_path / kind)
    if kind == "qwen3_5":  # two cannot share its output head evenly
        config = json.loads((model / "config.json").read_text())
        config["text_config"]["tie_word_embeddings"] = True
        (model / "config.json").write_text(json.dumps(config))
        weights: Any = mx.load(str(model / "model.safetensors"))
        del weights["lm_head.weight"]
        mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "pt"})
    source = {"type": "base64", "media_type": "image/png"}
    data = base64.b64encode(png(PICTURES[0])).decode()
    content = [{"type": "image", "source": {**source, "data": data}}]
    note = [{"type": "text", "text": UNSEEN}]
    group = Group(tmp_path, 2, "--model", str(model), *flags)
    try:
        answers = [
            ask(group.server, "", messages=[{"role": "user", "content": shown}], max_tokens=9)
            for shown in (content, note, content)
        ]
        assert len({json.dumps(answer["content"]) for answer in answers}) == 1
        with urlopen(f"{group.server.url}/api/tags", timeout=60) as answer:
            assert b'"vision"' not in answer.read()
        group.server.wait_for("cannot see images")
        assert group.stop() == [0, 0]
    finally:
        group.kill()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--pipeline"]])
def test_of_four_processes_one_is_killed_which_running_requests_say_and_all_end(
    flags: list[str], model: Path, alone: list, tmp_path: Path
):
    group = Group(tmp_path, 4, "--model", str(model), *flags)
    try:
        assert ask(group.server, "number 0")["content"] == alone[0]
        with send(group.server, "number 0", max_tokens=1000, stream=True) as answer:
            next(line for line in answer if b"content_block_delta" in line)
            group.followers[0].kill()
            assert "a machine of the group is gone" in answer.read().decode()
        statuses = [process.wait(20) for process in [group.server.process, *group.followers[1:]]]
        assert statuses == [1, 1, 1]
    finally:
        group.kill()


def test_what_a_group_cannot_do_is_refused_at_once(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def refusal(*flags: str) -> str:
        with pytest.raises(SystemExit):
            main(flags)
        return capsys.readouterr().err

    assert "--pipeline needs mlx.launch" in refusal("--model", "demo", "--pipeline")
    monkeypatch.setenv("MLX_RANK", "0")
    assert "one model" in refusal() and "no --cache-dir" in refusal(
        "--model", "demo", "--cache-dir", "x"
    )


def test_strangers_do_not_keep_a_group_from_coming_together() -> None:
    key = b"k" * 32
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        silent = [socket.create_connection(address) for _ in range(3)]
        wrong = socket.create_connection(address)
        wrong.sendall(b"GET / HTTP/1.1\r\n\r\n")

        def join(rank: int) -> connection.Connection:
            peer = connection.Client(address, authkey=key)
            peer.send(rank)
            return peer

        with ThreadPoolExecutor() as pool:
            joined = [pool.submit(join, rank) for rank in (1, 2)]
            peers = accept_peers(listener, key, 2, 30)
            assert sorted(peers.values()) == [1, 2]
            for peer in [*peers, *(one.result() for one in joined)]:
                peer.close()
        with pytest.raises(ConnectionError, match="only 1 processes of 2"):
            accept_peers(listener, key, 1, 0.3)
    for stranger in [*silent, wrong]:
        stranger.close()
