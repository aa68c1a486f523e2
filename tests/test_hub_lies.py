"""A hub that lies: where its headers say files go, how long its answers are, what it lists."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, HubHandler, demo_files, digest, serving

from _mlx_server.inference.catalog import hub_client
from _mlx_server.inference.catalog.download import HubError
from _mlx_server.inference.catalog.hub import Hub

Lie = Callable[["Liar"], bool]


class Liar(HubHandler):
    """Answers as `lie` of its server does, where that returns true."""

    def do_GET(self):
        if not self.server.lie(self):
            super().do_GET()

    def say(self, code: int, headers: dict[str, str], body: bytes = b"") -> bool:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # who asked has heard enough
                self.wfile.write(body)
        return True

    def is_file(self, name: str) -> bool:
        return self.path.startswith("/org/") and self.path.endswith(f"/{name}")

    def is_about(self) -> bool:
        return self.path.startswith("/api/models/org/m")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving({"org/m": demo_files()}) as hub:
        hub.RequestHandlerClass = Liar
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield hub


def pull(tmp_path: Path, name: str = "org/m") -> str:
    """What a pull that fails says."""
    with (
        pytest.raises(HubError) as failure,
        contextlib.closing(Hub(tmp_path / "hub").pull(name)) as steps,
    ):
        list(steps)
    return str(failure.value)


def pulled(tmp_path: Path) -> set[str]:
    """The names of the files that a pull brings."""
    with contextlib.closing(Hub(tmp_path / "hub").pull("org/m")) as steps:
        list(steps)
    [snapshot] = (tmp_path / "hub" / "models--org--m" / "snapshots").iterdir()
    return {path.name for path in snapshot.iterdir()}


@pytest.mark.parametrize("planted", [False, True])
def test_no_etag_leads_out_of_the_cache(hub: FakeHub, tmp_path: Path, planted: bool):
    content, victim = b"echo evil", tmp_path / ".bashrc"
    if not planted:
        victim.write_text("precious")

    def lie(liar: Liar) -> bool:
        if liar.is_about():  # the digest that is listed is right, so nothing is damaged
            about = liar.described("org/m")
            file = {"rfilename": "a.json", "size": len(content), "blobId": digest("", content)}
            liar.send_json({**about, "siblings": [file, *about["siblings"]]})
            return True
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": '"../../../.bashrc"'}
        return liar.is_file("a.json") and liar.say(200, headers, content)

    hub.lie = lie
    assert "failed" in pull(tmp_path)
    assert victim.exists() != planted
    assert planted or victim.read_text() == "precious"


def test_no_commit_leads_out_of_the_cache(hub: FakeHub, tmp_path: Path):
    headers = {"X-Repo-Commit": "../../../planted", "X-Error-Code": "EntryNotFound"}
    hub.lie = lambda liar: liar.path.startswith("/org/") and liar.say(404, headers)
    assert "404" in pull(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_file_that_does_not_end_is_given_up(hub: FakeHub, tmp_path: Path):
    sent = 0

    def lie(liar: Liar) -> bool:
        nonlocal sent
        if not (liar.path.startswith("/cdn/") and liar.path.endswith("/config.json")):
            return False
        liar.say(200, {"Connection": "close", "Content-Length": str(10**9)})
        with contextlib.suppress(OSError):
            while sent < 10**9:
                sent += liar.wfile.write(bytes(10**6))
        return True

    hub.lie = lie
    assert pull(tmp_path) == "config.json is longer than the hub says; pull again"
    assert sent < 10**8


def test_a_list_without_end_ends_and_no_other_host_gets_the_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def lie(liar: Liar) -> bool:
        if not liar.path.startswith(("/api/models?", "/next")):
            return False
        asked.append((liar.headers["Host"], liar.headers["Authorization"]))
        url = f"http://localhost:{hub.server_port}/next{len(asked)}"
        return liar.say(200, {"Link": f'<{url}>; rel="next"'}, b"[]")

    hub.lie = lie
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 1.0)
    assert "its answer takes more than 1 seconds" in pull(tmp_path, "qwen3:8b")
    assert len(asked) > 2
    assert {token for host, token in asked if host.startswith("localhost")} == {None}
    assert asked[0][1] == "Bearer secret"


@pytest.mark.parametrize("coding", ["", "gzip", "br"])
def test_an_answer_is_bounded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str
):
    headers = {"Content-Encoding": coding} if coding else {}
    blanks = b" " * (3 << 20)
    body = gzip.compress(blanks) if coding == "gzip" else blanks
    hub.lie = lambda liar: liar.is_about() and liar.say(200, headers, body)
    monkeypatch.setattr(hub_client, "ANSWER_BYTES", 2 << 20)
    assert ("is compressed" if coding == "br" else "has more than 2 MB") in pull(tmp_path)


def test_an_answer_may_come_packed(hub: FakeHub, tmp_path: Path):
    asked = []

    def lie(liar: Liar) -> bool:
        if not liar.is_about():
            return False
        asked.append(liar.headers["Accept-Encoding"])
        about = json.dumps({**liar.described("org/m"), "description": "long " * 100_000})
        return liar.say(200, {"Content-Encoding": "gzip"}, gzip.compress(about.encode()))

    hub.lie = lie
    assert pulled(tmp_path) == set(demo_files()) - {"README.md"}
    assert set(asked) == {"gzip"}


@pytest.mark.parametrize(
    "etag", ['"{SHA1{0a1b}}"', 'W/"5f-18c"', "CKi+0a1b==", '"0a1b-12"', '"0a1b:b,c"']
)
def test_other_hubs_have_other_etags(hub: FakeHub, tmp_path: Path, etag: str):
    files = demo_files()

    def lie(liar: Liar) -> bool:
        if not liar.path.startswith("/org/"):
            return False
        name = liar.path.rpartition("/")[2]
        said = f"{etag[:-1]}{name}{etag[-1:]}" if etag[-1] == '"' else name + etag
        return liar.say(200, {"X-Repo-Commit": COMMIT, "ETag": said}, files[name])

    hub.lie = lie
    assert pulled(tmp_path) == set(files) - {"README.md"}


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("retry-after", "30", True),
        ("retry-after", "3000", False),
        ("ratelimit", '"resolvers";r=0;t=299', True),
        ("ratelimit", '"resolvers";r=0;t=2990', False),
        ("ratelimit", '"a";r=0;t=1, "b";r=0;t=2990', False),
    ],
)
def test_a_hub_says_how_long_to_wait_if_that_is_not_long(
    hub: FakeHub, name: str, value: str, kept: bool
):
    from huggingface_hub import get_session

    hub_client.guard()
    hub.lie = lambda liar: liar.say(429, {name: value})
    assert (name in get_session().get(hub.url).headers) == kept
    with hub_client.bounded():
        assert (name in get_session().get(hub.url).headers) == (kept and "299" not in value)


@pytest.mark.parametrize(
    "file",
    [
        {"size": "12"},
        {"size": 10**400},
        {"size": -1},
        {"size": [1]},
        {"rfilename": "a/" * 2000 + "x.json"},
        {"rfilename": "a" * 300 + ".json"},
        {"rfilename": "a\0.json"},
    ],
    ids=["text", "huge", "negative", "list", "deep", "long", "nul"],
)
def test_a_file_that_is_none_is_one_sentence(hub: FakeHub, tmp_path: Path, file: dict[str, Any]):
    def lie(liar: Liar) -> bool:
        if not liar.is_about():
            return False
        about = json.loads(json.dumps(liar.described("org/m")))
        about["siblings"][0].update({"rfilename": "x.json", **file})
        liar.send_json(about)
        return True

    hub.lie = lie
    assert "describes org/m in a way that makes no sense" in pull(tmp_path)
