"""What is made of a conversation's messages, kept for when it comes again with more of them."""

from __future__ import annotations

import bisect
import json
import marshal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.prompt.conversations import KnownMessage
from _mlx_server.inference.protocol import Message

# Of marshal's formats, the last one in which the same values are always the same bytes, whatever
# objects they share
_FORMAT = 2
_HEAD = len(marshal.dumps([], _FORMAT))  # in front of a list's items


@dataclass(frozen=True)
class History:
    """A conversation: its messages as bytes, one behind the other, where each of them ends there,
    and what is known of them. `key` finds it again; "" if it is not to be kept."""

    key: str
    written: bytes
    ends: list[int]
    messages: list[KnownMessage]

    def shared(self, written: bytes) -> int:
        """How many messages at the beginning are also those of a list that marshal has written."""
        if written.startswith(self.written, _HEAD):
            return len(self.ends)
        return bisect.bisect_left(
            self.ends, True, key=lambda end: not written.startswith(self.written[:end], _HEAD)
        )


_EMPTY = History("", b"", [], [])


class HistoryMemo:
    """Makes what is to be made of each message once, also where a conversation comes with every
    request, each time as new objects. `escape` makes a message ready for a template.

    A message is known again if it and all those before it are written by the same bytes. Written
    that way, values of different types differ, such as 1 and True, and so do objects whose keys
    have another order, which a template would show. Thread-safe."""

    REMEMBERED = 16 * 2**20  # bytes of conversations
    MESSAGE = 2000  # bytes that a message takes beside its text, which is kept twice

    def __init__(self, escape: Callable[[Message], Message]):
        self._escape = escape
        self._histories: BoundedMap[History] = BoundedMap(  # by what their first messages are
            self.REMEMBERED, self._size
        )

    def prepare(self, messages: list[Message]) -> History:
        """A conversation with what is made of its messages, which is not kept yet."""
        try:
            written = marshal.dumps(messages, _FORMAT)
            key = str(hash(marshal.dumps(messages[:2], _FORMAT)))
        except ValueError:  # not only plain values, or nested deeply
            return History("", b"", [], list(map(self._make, messages)))
        known = self._histories.get(key) or _EMPTY
        same = known.shared(written)
        ends, found = known.ends[:same], known.messages[:same]
        if same == len(messages):
            return History("", b"", ends, found)
        for message in messages[same:]:
            ends.append((ends[-1] if ends else 0) + len(marshal.dumps(message, _FORMAT)))
            found.append(self._make(message))
        return History(key, written[_HEAD:], ends, found)

    def keep(self, history: History) -> None:
        """Keeps what `prepare` has returned, once the conversation is one that can be read."""
        if history.key:
            self._histories.put(history.key, history)

    def _size(self, key: str, history: History) -> int:
        return 2 * len(history.written) + self.MESSAGE * (1 + len(history.messages))

    def _make(self, message: Message) -> KnownMessage:
        return KnownMessage(message, self._escape(message))


def exact_bytes(value: Any) -> bytes:
    """A value as bytes that no other value has; of what is not plain JSON, what `repr` tells of
    it."""
    try:
        return marshal.dumps(value, _FORMAT)
    except ValueError:
        return json.dumps(value, default=repr).encode()
