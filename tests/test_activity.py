"""What `GET /activity` tells, who may ask, and cancelling a request that somebody waits for."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Server, until
from test_http import LONG, ask

from _mlx_server.front import activity
from _mlx_server.inference.protocol import Stats, Totals

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SHORT = {"model": "demo", "messages": [{"role": "user", "content": "say hello"}], "max_tokens": 9}


def documented(table: int) -> set[str]:
    """The fields that a table of the module's docstring describes."""
    rows = activity.__doc__.split("| field | is |")[1 + table].split("\n\n")[0].splitlines()
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def look(server: Server, **headers: str) -> dict:
    response, text = ask(server, "GET", "/activity", None, headers)
    assert response.status == 200, text
    return json.loads(text)


def being_read(server: Server, **headers: str) -> dict:
    """Waits for a request whose prompt is being read."""

    def rows() -> list[dict]:
        return [row for row in look(server, **headers)["working"] if row.get("seconds_left")]

    return until(rows, PATIENCE)[0]


def until_ended(server: Server, known: Callable[[list[dict]], bool], **headers: str) -> None:
    """Waits until the rows of requests that have ended, the latest first, are as `known` wants
    them: a client has its answer a moment before it is told of."""
    until(lambda: known(look(server, **headers)["recent"]), PATIENCE)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def long_request(pool: ThreadPoolExecutor, server: Server, path: str, **more) -> Future:
    body = {**SHORT, "messages": [{"role": "user", "content": LONG}], "prompt": LONG, **more}
    if path == "/v1/responses":
        body = {"model": "demo", "input": LONG, **more}
    if path == "/api/embed":
        body = {"model": "demo", "input": [LONG], **more}
    key = {"x-api-key": "much"}
    return pool.submit(ask, server, "POST", path, body, key)


def test_what_is_documented_is_told(server: Server):
    page = (ROOT / "docs" / "page.md").read_text("utf-8")
    tables = activity.__doc__.split("| field | is |")[1:]
    assert all(table.split("\n\n")[0].strip() in page for table in tables)
    assert ask(server, "POST", "/v1/messages", SHORT)[0].status == 200
    short = "demo", "stop"
    until_ended(server, lambda rows: any((r["model"], r["ending"]) == short for r in rows))
    report = look(server)
    assert {*report} == documented(0)
    assert (report["status"], report["default"]) == ("ok", "demo")
    assert "demo" in [model["name"] for model in report["loaded"]]
    memory = report["memory"]
    assert memory["weights"] > 0 and memory["prompt_cache"] < memory["limit"]


@pytest.mark.slow
def test_a_request_is_told_of_while_it_runs_and_cancelled(
    server: Server, background: ThreadPoolExecutor
):
    began = time.time()
    waits = long_request(background, server, "/v1/messages")
    row = being_read(server)
    assert {*row} == documented(1)
    assert (row["model"], row["dialect"], row["route"]) == ("demo", "anthropic", "/v1/messages")
    assert row["phase"] == "prefill" and 0 < row["read_tokens"] < row["prompt_tokens"]
    assert look(server)["memory"]["states"] > 0
    assert ask(server, "DELETE", f"/activity/{row['id']}")[0].status == 204
    response, text = waits.result(PATIENCE)
    assert response.status == 499 and b"cancelled at the server" in text
    until_ended(server, lambda rows: rows[0]["time"] >= began and rows[0]["ending"] == "cancelled")
    assert look(server)["working"] == []
    assert ask(server, "DELETE", f"/activity/{row['id']}")[0].status == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, said",
    [
        ("/v1/messages", b"event: error"),
        ("/v1/chat/completions", b'"error":{"message":"the request was cancelled'),
        ("/v1/responses", b"event: response.failed"),
        ("/api/chat", b'{"error":"the request was cancelled'),
        ("/api/generate", b'{"error":"the request was cancelled'),
        ("/api/embed", b'{"error":"the request was cancelled'),
    ],
)
def test_a_cancelled_stream_ends_with_an_error_of_its_dialect(
    server: Server, background: ThreadPoolExecutor, path: str, said: bytes
):
    waits = long_request(background, server, path, stream=True)
    ask(server, "DELETE", f"/activity/{being_read(server)['id']}")
    response, text = waits.result(PATIENCE)
    assert said in text
    assert response.status == (499 if path == "/api/embed" else 200)
    assert ask(server, "POST", "/v1/messages", SHORT)[0].status == 200


def test_no_foreign_page_cancels(server: Server):
    foreign = {"Origin": "http://foreign.example"}
    for method, path in [("GET", "/activity"), ("DELETE", "/activity/x"), ("OPTIONS", "/activity")]:
        assert ask(server, method, path, None, foreign)[0].status == 403
    assert ask(server, "POST", "/activity/x")[0].status == 405


def test_a_browser_gets_the_page_and_everyone_else_ollamas_words(server: Server):
    response, text = ask(server, "GET", "/", None, BROWSER)
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    policy = response.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert ask(server, "HEAD", "/", None, BROWSER)[0].status == 200
    files = re.findall(r'(?:href|src)="(page/[^"]+)"', text.decode())
    assert files
    for file in files:
        response, text = ask(server, "GET", f"/{file}", None, {"Accept": "*/*"})
        assert response.status == 200 and text
        assert response.getheader("X-Content-Type-Options") == "nosniff"
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        assert ask(server, "GET", "/", None, accept)[1] == b"Ollama is running"
    assert ask(server, "GET", "/page/../page.py")[0].status == 404


@pytest.mark.slow
def test_where_several_keys_share_a_server_little_is_told_and_low_ones_see_nothing(
    background: ThreadPoolExecutor,
):
    server = Server("--api-key", "much", "--api-key", "more", "--api-key", "little=low")
    try:
        many = "word " * 400
        for content in (f"{many} say a", f"{many} say a", f"{many} say b"):
            body = {**SHORT, "messages": [{"role": "user", "content": content}]}
            assert ask(server, "POST", "/v1/messages", body, {"x-api-key": "much"})[0].status == 200
        until_ended(server, lambda rows: len(rows) == 3, **{"x-api-key": "more"})
        recent = look(server, **{"x-api-key": "more"})["recent"]
        assert [row["cached_tokens"] for row in recent] == [0, 256, 0]
        assert not any("miss" in row for row in recent)
        waits = long_request(background, server, "/v1/messages")
        row = being_read(server, **{"x-api-key": "more"})
        for method, path in [("GET", "/activity"), ("DELETE", f"/activity/{row['id']}")]:
            assert ask(server, method, path, None, {"x-api-key": "little"})[0].status == 403
            assert ask(server, method, path)[0].status == 401
        path = f"/activity/{row['id']}"
        assert ask(server, "DELETE", path, None, {"x-api-key": "more"})[0].status == 204
        assert waits.result(PATIENCE)[0].status == 499
    finally:
        assert server.stop() == 0


def test_samples_of_ten_minutes_are_few_objects(monkeypatch: pytest.MonkeyPatch):
    """Each object would keep a hundred times its size from going back to the system, if much is in
    use when it is made."""
    monkeypatch.setattr(activity, "INTERVAL", 0.0)
    watched = activity.Activity()
    watched.sample(Totals)
    before = sys.getallocatedblocks()
    for _ in range(2 * activity.SAMPLES):
        watched.sample(Totals)
    assert sys.getallocatedblocks() - before < activity.SAMPLES / 2
    told = watched.report(None, None, Stats(*[0] * 11, Totals()), [], False)
    samples = told["throughput"]["samples"]
    assert [len(sample) for sample in samples] == [4] * activity.SAMPLES
    assert samples[-1][0] >= samples[0][0] > 0


@pytest.mark.slow
def test_tokens_are_counted_as_they_come_and_warnings_show_no_path(tmp_path: Path):
    broken = tmp_path / "Broken-1B"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (broken / name).write_text("{")
    server = Server("--models-dir", str(tmp_path))
    try:
        body = {**SHORT, "messages": [{"role": "user", "content": "count to 20"}]}
        written = json.loads(ask(server, "POST", "/v1/messages", body)[1])["usage"]["output_tokens"]
        deadline = time.monotonic() + PATIENCE
        while True:
            rates = look(server)["throughput"]
            counted = sum(sample[1] for sample in rates["samples"]) * rates["seconds"]
            if counted > 0.8 * written:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        prefilled, reused = (sum(sample[at] for sample in rates["samples"]) for at in (2, 3))
        assert prefilled > 0 and reused == 0
        warnings = look(server)["warnings"]
        assert any("is broken" in one["message"] for one in warnings)
        assert not any(str(tmp_path) in one["message"] for one in warnings)
    finally:
        assert server.stop() == 0
