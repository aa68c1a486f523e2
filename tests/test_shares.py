"""What many requests of one client leave to others that may do the same."""

from __future__ import annotations

import base64
import contextlib
import contextvars
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import PATIENCE, until
from phases import Phases
from test_keys import Noted
from test_limits import HI, KEYS, call
from test_vision import FILES, OTHER
from vision_models import build_vision_model

from _mlx_server.front.sockets import is_readable
from _mlx_server.front.turns import PREPARED
from _mlx_server.inference.images.images import read_pixels
from _mlx_server.inference.images.pdf import IS_CLIENT_GONE
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.sequence import State
from engine import Engine, EngineBusy, Generation, Priority

CHAT = {"model": "demo", "messages": HI, "options": {"num_predict": 1}}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("demo") as engine:
        yield engine


@pytest.mark.parametrize("priority", Priority)
def test_who_has_many_requests_waiting_leaves_others_a_share(phases: Phases, priority: Priority):
    places = {Priority.LOW: 4, Priority.NORMAL: 8, Priority.HIGH: 12}[priority]
    hold = phases.hold(State.PREFILL)
    with Engine("demo", max_queue=8) as engine:

        def begin(client: str) -> Generation:
            return engine.chat("say hi", max_tokens=1, priority=priority, client=client)

        begun = [begin("many")]
        with hold:
            for client, number in ("many", places), ("few", places // 2):
                begun += [begin(client) for _ in range(number)]
                with pytest.raises(EngineBusy, match=f"{len(begun) - 1} requests are waiting"):
                    begin(client)
        assert [list(one)[-1].reason for one in begun] == ["length"] * len(begun)


def test_who_has_many_answers_in_work_lets_one_of_another_in(
    monkeypatch: pytest.MonkeyPatch, phases: Phases
):
    monkeypatch.setattr(ModelPool, "MOST_LOW", 3)
    with Engine("demo") as engine:

        def begin(client: str, number: int) -> Generation:
            text = f"count to {number + 20}"
            return engine.chat(text, max_tokens=100, priority=Priority.LOW, client=client)

        alone = ["".join(begin("many", number).text()) for number in range(4)]
        hold = phases.hold(State.DECODE, 3)
        many = [begin("many", number) for number in range(3)]
        with hold:
            many.append(begin("many", 3))
            few = [begin("few", number) for number in range(2)]
        assert [*map("".join, (one.text() for one in many))] == alone
        assert [*map("".join, (one.text() for one in few))] == alone[:2]
    ended = min(phases.when(one, State.ENDED) for one in many)
    first, second = (phases.when(one, State.PREFILL) for one in few)
    assert first < ended < second and first < phases.when(many[3], State.PREFILL)


def test_connections_of_one_low_key_leave_room_for_those_of_others(engine: Engine, serve: Callable):
    server = serve(engine, api_keys={**KEYS, "other": Priority.LOW})
    server.max_connections = 16
    with ThreadPoolExecutor() as pool:
        with server.turns.take(Priority.LOW, lambda: False):
            waiting = [pool.submit(call, server, "guest", "/api/chat", CHAT) for _ in range(4)]
            until(lambda: server.connections - server.waiting == 4)
            assert call(server, "guest", "/api/chat", CHAT)[0].status == 503
            waiting += [pool.submit(call, server, "other", "/api/chat", CHAT) for _ in range(2)]
            until(lambda: server.connections - server.waiting == 6)
            assert call(server, "other", "/api/chat", CHAT)[0].status == 503
            assert call(server, "boss", "/api/chat", CHAT)[0].status == 200
        assert [one.result()[0].status for one in waiting] == [200] * 6


@pytest.mark.parametrize("keys", [{}, {"boss": Priority.HIGH}])
def test_requests_of_other_machines_with_the_same_rights_wait_for_their_turn(
    engine: Engine, serve: Callable, monkeypatch: pytest.MonkeyPatch, keys: dict
):
    address = ["far"]
    monkeypatch.setattr("_mlx_server.front.connections.network_of", lambda _: address[0])
    server = serve(engine, api_keys=keys)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as turns:
        for _ in range(int(PREPARED[Priority.NORMAL])):
            turns.enter_context(server.turns.take(Priority.NORMAL, lambda: False))
        far = pool.submit(call, server, "boss", "/api/chat", CHAT)
        until(lambda: server.connections - server.waiting == 1)
        address[0] = ""
        assert call(server, "boss", "/api/chat", CHAT)[0].status == 200
        assert not far.done()
        turns.close()
        assert far.result()[0].status == 200


def test_between_two_images_of_a_request_others_have_their_turn(serve: Callable, tmp_path: Path):
    with Engine(str(build_vision_model("qwen3_vl", tmp_path / "vision"))) as engine:
        server = serve(engine, api_keys={**KEYS, "other": Priority.LOW})
        server.image_turns = noted = Noted()
        text = {**CHAT, "model": "default"}
        images = [base64.b64encode(file).decode() for file in (FILES[0], OTHER)]
        seen = {**text, "messages": [{**HI[0], "images": images}]}
        with ThreadPoolExecutor() as pool:
            with noted.take(Priority.LOW, lambda: False):
                asked = pool.submit(call, server, "guest", "/api/chat", seen)
                until(lambda: len(noted.wanted) == 2)
                assert call(server, "other", "/api/chat", text)[0].status == 200
                assert not asked.done()
            assert asked.result()[0].status == 200
        assert len(noted.wanted) == 3


def test_an_image_that_nobody_waits_for_is_not_read():
    def read() -> None:
        IS_CLIENT_GONE.set(lambda: True)
        read_pixels(FILES[0], lambda width, height: (width, height), 3)

    with pytest.raises(ConnectionAbortedError):
        contextvars.copy_context().run(read)


@pytest.mark.parametrize(
    "line", ["GET / HTTP/1.1\r\nOrigin: http://evil.example", "GET / HTTP/9.9"]
)
def test_refused_requests_keep_their_distance_where_there_are_no_keys(serve: Callable, line: str):
    server = serve()
    server.keyless_pace.gap = 3600.0
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        first, second = (
            stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(2)
        )
        first.sendall(f"{line}\r\nHost: localhost\r\n\r\n".encode())
        assert first.recv(4096).startswith((b"HTTP/1.1 403", b"HTTP/1.1 505"))
        second.sendall(f"{line}\r\nHost: localhost\r\n\r\n".encode())
        for _ in range(9):
            assert call(server, "", "/api/version", None, "GET")[0].status == 200
        assert not is_readable(second, 0)
