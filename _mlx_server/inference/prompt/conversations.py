"""The memory of what was read and generated, conversation by conversation."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.images.images import lasting
from _mlx_server.inference.protocol import Message

Call = tuple[str, str, dict[str, Any]]
"""A tool call: its id, the tool's name and the arguments."""


@dataclass(frozen=True)
class Reading:
    """The tokens of a conversation up to the end of one of its messages, as they were read or
    generated: those of the reading with the key `before` ("" for none), then `tokens`. `names` are
    names of messages that these tokens hold, with the keys that they lead to. `thoughtful` says
    that the model's thinking is among all these tokens."""

    before: str
    tokens: Sequence[int]
    names: dict[str, str]
    thoughtful: bool = False


class KnownMessage:
    """A message with what is made of it: `escaped`, as a template is given it, and its names. Any
    thread may use it."""

    def __init__(self, message: Message, escaped: Message):
        self.message, self.escaped = message, escaped
        self._names: tuple[str | None, list[str]] = None, []  # with the key; replaced as a whole

    def names(self, key: str) -> list[str]:
        """The names under which the message may lead on from a key: see `message_names`."""
        before, names = self._names
        if before != key:
            names = list(message_names(key, self.message))
            self._names = key, names
        return names


class ConversationMemory:
    """Finds the tokens that a conversation was read as when it comes again with more messages.

    The rule: a conversation that only grew is read as it was read before. Templates render a turn
    differently once it is history, clients rewrite the arguments of calls and drop thinking, and
    text need not be tokenised as it was generated; the KV cache is only good for the very tokens.

    A key names a conversation up to a message: it is a hash of the key before and of the message,
    the first key being that of the system message, the tools and the template's options. So a
    changed message changes all keys from there on, and nothing stale is found. A message may lead
    on by several names, which are then one key: an answer with calls by their ids, since clients
    rewrite arguments, or by the calls themselves; with the model's thinking or without it.

    There is one for each model and owner of requests. At most `MOST` bytes are kept; the readings
    that were not used for the longest time go first.

    Thread-safe: every method holds the lock of this memory alone, and calls nothing outside."""

    MOST = 32 * 2**20  # bytes of readings
    TOKEN = 8  # bytes of a token
    READING = 600  # bytes of a reading beside its tokens and names
    NAME = 320  # bytes of a name and its key, and of their places

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readings: dict[str, Reading] = {}  # by key, the latest used last
        self._keys: dict[str, str] = {}  # by name
        self._size = 0
        # The parts of the conversation that was asked for last, each with its tokens as a list. It
        # mostly comes again, and to make the integers of a long one takes longer than all else that
        # is done with it. Replaced as a whole, and none of the lists is changed.
        self._latest: list[tuple[Sequence[int], list[int]]] = []

    def follow(self, start: str, messages: Iterable[KnownMessage]) -> list[str]:
        """The key behind each message of a conversation that begins with the key `start`."""
        keys, key = [], start
        for message in messages:
            for name in message.names(key):
                with self._lock:
                    known = self._keys.get(name)
                if known is not None:
                    break
            key = name if known is None else known
            keys.append(key)
        return keys

    def tokens(self, key: str) -> list[int] | None:
        """All tokens of a reading, in a list of the caller's own; None if it, or one that it goes
        on from, is not there."""
        parts: list[Sequence[int]] = []
        with self._lock:
            while key:
                reading = self._readings.pop(key, None)
                if reading is None or len(parts) > len(self._readings):  # or it goes in a circle
                    return None
                self._readings[key] = reading
                parts.append(reading.tokens)
                key = reading.before
        parts.reverse()
        known = itertools.chain(self._latest, itertools.repeat((None, [])))
        latest = [
            (part, integers if part is old else list(part))
            for part, (old, integers) in zip(parts, known, strict=False)
        ]
        self._latest = latest
        tokens: list[int] = []
        for _, integers in latest:
            tokens += integers
        return tokens

    def get(self, key: str) -> Reading | None:
        """A reading by its key."""
        with self._lock:
            return self._readings.get(key)

    def learn(self, readings: Mapping[str, Reading]) -> None:
        """Keeps readings by their keys."""
        for key, reading in readings.items():
            compact = array("q", reading.tokens)
            with self._lock:
                self._forget(key)
                self._readings[key] = Reading(
                    reading.before, compact, reading.names, reading.thoughtful
                )
                self._keys |= reading.names
                self._size += self._bytes(reading)
                while self._size > self.MOST:  # even if that is all there is
                    self._forget(next(iter(self._readings)))

    def _bytes(self, reading: Reading) -> int:
        named = self.NAME * len(reading.names)
        return self.READING + self.TOKEN * len(reading.tokens) + named

    def _forget(self, key: str) -> None:
        reading = self._readings.pop(key, None)
        if reading is not None:
            self._size -= self._bytes(reading)
            for name in reading.names:
                self._keys.pop(name, None)


def message_names(key: str, message: Message) -> Iterator[str]:
    """The names under which a message may lead on from a key, the best one first; at least one."""
    if message["role"] != "assistant":
        yield _hashed(key, *itertools.chain.from_iterable(sorted(message.items())))
        return
    thinking = message.get("reasoning_content", "").strip()
    calls = message_calls(message)
    for by_id in _ways(calls):
        yield _named(key, message["content"], thinking, calls, by_id)


def message_calls(message: Message) -> list[Call]:
    """The calls of an assistant's message."""
    return [
        (call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]


def answer_names(key: str, text: str, thinking: str, calls: list[Call]) -> list[str]:
    """The names under which an answer to the conversation with this key may come back: with or
    without its thinking, with calls as they were or with arguments that the client has
    rewritten."""
    return [
        _named(key, text, thought, calls, by_id)
        for thought in dict.fromkeys((thinking.strip(), ""))
        for by_id in _ways(calls)
    ]


def _ways(calls: list[Call]) -> list[bool]:
    """Whether calls are named by their ids or as they are."""
    return [True, False] if calls and all(id for id, _, _ in calls) else [False]


def _named(key: str, text: str, thinking: str, calls: list[Call], by_id: bool) -> str:
    if not calls:
        return _hashed(key, "text", text.strip(), thinking)
    words = "".join(text.split())  # clients join the texts around calls in their own ways
    if by_id:
        return _hashed(key, "ids", words, thinking, *(id for id, _, _ in calls))
    return _hashed(key, "calls", words, thinking, _to_json([call[1:] for call in calls]))


_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def _hashed(key: str, *texts: str) -> str:
    """A hash of texts that all count, and where each of them ends."""
    texts = tuple(map(lasting, texts))
    whole = "".join((str([*map(len, texts)]), *texts))
    return hashlib.blake2b(
        whole.encode("utf-8", "surrogatepass"), digest_size=16, key=key.encode()
    ).hexdigest()
