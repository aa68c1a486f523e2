"""What huggingface_hub asks a hub with. A hub says in headers where its library writes files and
how long it waits, and in a link who gets the token next: none of that is taken on trust.

https://huggingface.co/docs/huggingface_hub/package_reference/utilities#configure-http-backend"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

ANSWER_SECONDS = 100.0  # for all pages of an answer
ANSWER_BYTES = 64 << 20  # of all pages; a list of 500 models has about 10 MB
_SILENCE = 30.0  # seconds between two pieces of an answer
# The cache's paths are made of these: of an etag the name of a file, of a commit that of a folder
_NAMES = {
    "etag": re.compile(r'(?:W/)?"?[\w-]+"?', re.ASCII),
    "x-linked-etag": re.compile(r'(?:W/)?"?[\w-]+"?', re.ASCII),
    "x-repo-commit": re.compile(r"[\da-f]{40}"),
}
_WAITS = ("retry-after", "ratelimit")  # for which the library sleeps, however long they say
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
        request.headers["accept-encoding"] = "identity"  # a few bytes of others make gigabytes


def _after(stream: type) -> Callable[[Any], None]:
    """Checks an answer's head, and has its body counted as it comes."""

    class Counted(stream):  # type: ignore[misc]
        def __init__(self, inner: Any, budget: _Budget):
            self._inner, self._budget = inner, budget

        def __iter__(self) -> Iterator[bytes]:
            for part in self._inner:
                self._budget.take(len(part))
                yield part

        def close(self) -> None:
            self._inner.close()

    def check(answer: Any) -> None:
        for name, form in _NAMES.items():
            if name in answer.headers and not form.fullmatch(answer.headers[name]):
                del answer.headers[name]
        for name in _WAITS:
            answer.headers.pop(name, None)
        if budget := _BUDGET.get():
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise HubTooSlow("its answer is compressed, and it was not asked for that")
            answer.stream = Counted(answer.stream, budget)

    return check
