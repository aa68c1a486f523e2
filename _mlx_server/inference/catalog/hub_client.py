"""What huggingface_hub asks a hub with. A hub says in headers where its library writes files and
how long it waits, and in a link who gets the token next: none of that is taken on trust.

https://huggingface.co/docs/huggingface_hub/package_reference/utilities#configure-http-backend"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

ANSWER_SECONDS = 100.0  # for all pages of an answer
ANSWER_BYTES = 64 << 20  # of all pages; a list of 500 models has about 10 MB
_SILENCE = 30.0  # seconds between two pieces of an answer
# The cache's paths are made of these: of an etag the name of a file, of a commit that of a folder.
# Other hubs have etags like "{SHA1{0a1b}}" or base64
_ETAG = re.compile(r'(?:W/)?"?(?!\.*"?\Z)[!#-.0-\[\]-~]{1,200}"?')
_NAMES = {
    "etag": _ETAG,
    "x-linked-etag": _ETAG,
    "x-repo-commit": re.compile(r"[\da-f]{40}"),
}
# For which the library sleeps, however long they say
_WAITS = {
    "retry-after": re.compile(r"\s*(\d{1,9})\s*"),
    "ratelimit": re.compile(r'"\w+"\s*;\s*r\s*=\s*\d{1,9}\s*;\s*t\s*=\s*(\d{1,9})'),
}
# Seconds; the hub counts requests in five minutes: https://huggingface.co/docs/hub/rate-limits
LONGEST_WAIT = 300.0
_PIECE = 65536  # bytes that are unpacked at once
_OWN = "huggingface.co"  # gets the token from its mirrors as well, as in the library


class HubTooSlow(Exception):
    """A hub's answer takes too long or is too long."""


class _Budget:
    """What is left of an answer."""

    def __init__(self) -> None:
        self.bytes, self.deadline = ANSWER_BYTES, time.monotonic() + ANSWER_SECONDS

    def seconds(self) -> float:
        """Raises HubTooSlow if none are left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise HubTooSlow(f"its answer takes more than {ANSWER_SECONDS:g} seconds")
        return left

    def take(self, size: int) -> None:
        """Raises HubTooSlow if that is too much."""
        self.seconds()
        self.bytes -= size
        if self.bytes < 0:
            raise HubTooSlow(f"its answer has more than {ANSWER_BYTES >> 20} MB")


_BUDGET: ContextVar[_Budget | None] = ContextVar("_BUDGET", default=None)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within it a hub is asked for what fits into memory. What it sends may raise HubTooSlow."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def guard() -> None:
    """Has huggingface_hub ask with care from now on."""
    from huggingface_hub import get_session, set_client_factory

    session: Any = get_session()
    if any(hook is _before for hook in session.event_hooks["request"]):
        return
    library: Any = importlib.import_module(type(session).__module__.partition(".")[0])

    def make() -> Any:
        hooks = session.event_hooks
        return type(session)(
            event_hooks={
                "request": [*hooks["request"], _before],
                "response": [*hooks["response"], _after(library.SyncByteStream)],
            },
            follow_redirects=session.follow_redirects,
            timeout=session.timeout,
        )

    set_client_factory(make)


def _before(request: Any) -> None:
    from huggingface_hub import constants

    host = request.url.host
    if host not in (urlsplit(constants.ENDPOINT).hostname, _OWN):
        request.headers.pop("authorization", None)
    if budget := _BUDGET.get():
        waits = request.extensions.get("timeout") or {}
        seconds = min(_SILENCE, budget.seconds())
        request.extensions = {
            **request.extensions,
            "timeout": {
                kind: min(waits.get(kind) or seconds, seconds)
                for kind in ("connect", "read", "write", "pool")
            },
        }
        if request.headers.get("accept-encoding") != "identity":  # as it is for parts of files
            request.headers["accept-encoding"] = "gzip"  # which is unpacked here, piece by piece


def _after(stream: type) -> Callable[[Any], None]:
    """Checks an answer's head, and has its body counted as it comes."""

    class Counted(stream):  # type: ignore[misc]
        def __init__(self, inner: Any, budget: _Budget, packed: bool):
            self._inner, self._budget, self._packed = inner, budget, packed

        def __iter__(self) -> Iterator[bytes]:
            unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
            for part in self._inner:
                self._budget.take(len(part))
                if not self._packed:
                    yield part
                    continue
                piece = unpacker.decompress(part, _PIECE)
                while piece:
                    self._budget.take(len(piece))
                    yield piece
                    piece = unpacker.decompress(unpacker.unconsumed_tail, _PIECE)

        def close(self) -> None:
            self._inner.close()

    def check(answer: Any) -> None:
        for name, form in _NAMES.items():
            if name in answer.headers and not form.fullmatch(answer.headers[name]):
                del answer.headers[name]
        budget = _BUDGET.get()
        for name, form in _WAITS.items():
            said = form.fullmatch(answer.headers.get(name, ""))
            if not said or int(said[1]) > (budget.seconds() if budget else LONGEST_WAIT):
                answer.headers.pop(name, None)
        if budget:
            coding = answer.headers.pop("content-encoding", "identity")
            if coding not in ("identity", "gzip"):
                raise HubTooSlow("its answer is compressed, and it was not asked for that")
            answer.stream = Counted(answer.stream, budget, coding == "gzip")

    return check
