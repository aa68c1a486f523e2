"""One model on several machines: `mlx.launch`'s processes answer as one does, and end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, Server
from models import CONFIGS, build_model

CONFIG = {**CONFIGS["qwen2"], "num_key_value_heads": 4, "num_hidden_layers": 5}  # which no number of ranks divides
SYSTEM = "You are one of many. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("qwen2", tmp_path_factory.mktemp("model") / "wide", config=CONFIG)


class Group:
    """Processes as `mlx.launch --backend ring` starts them. `server` is rank 0, the only one that listens."""

    def __init__(self, folder: Path, size: int, *flags: str):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        for one in sockets:
            one.close()
        envs = [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(size)]
        command = [sys.executable, str(ROOT / "mlx_server.py"), *flags]
        self.followers = [subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, **env}) for env in envs[1:]]
        self.server = Server(*flags, env=envs[0])

    def stop(self) -> list[int]:
        """The exit status of each rank after rank 0 was told to end."""
        return [self.server.stop(), *(follower.wait(20) for follower in self.followers)]

    def kill(self) -> None:
        for process in [self.server.process, *self.followers]:
            process.kill()
            process.wait()


def ask(server: Server, text: str, **fields: Any) -> dict:
    """An answer of Anthropic's API."""
    body = {"model": "default", "max_tokens": 8, "system": SYSTEM, "messages": [{"role": "user", "content": text}], **fields}
    with urlopen(Request(f"{server.url}/v1/messages", json.dumps(body).encode()), timeout=60) as answer:
        return json.load(answer)


def conversation(server: Server) -> list:
    """Four answers at once, then two one after the other with what these took from the prompt cache."""
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda n: ask(server, f"number {n}", max_tokens=4 + n), range(4)))
    again = [ask(server, "number 1, once more"), ask(server, "number 1, once more, please")]
    return [one["content"] for one in many] + [(one["content"], one["usage"]) for one in again]


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[list]:
    server = Server("--model", str(model))
    yield conversation(server)
    server.stop()


@pytest.mark.parametrize("size, flags", [(2, []), (2, ["--pipeline"]), (4, []), (4, ["--pipeline"])])
def test_a_group_answers_as_one_process_does(size: int, flags: list[str], model: Path, alone: list, tmp_path: Path):
    group = Group(tmp_path, size, "--model", str(model), *flags)
    try:
        assert conversation(group.server) == alone
        assert group.stop() == [0] * size
    finally:
        group.kill()
