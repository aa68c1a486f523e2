"""What an answer may quote of tool results, in the spelling in which it will stand there.

Clients show files with a number before each line, and models write the lines without them, within a
call as the call's syntax spells strings. Looked up in the prompt as it is, such a copy would break
at every line."""

from __future__ import annotations

import array
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator

from _mlx_server.inference.bounded import ENTRY, BoundedMap
from _mlx_server.inference.output.call_syntax import ObjectSyntax
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import Message

_NUMBERED = re.compile(r" *(\d+)(?:\t|→)")


class Quotable:
    """Spells the tool results of conversations as one model's answers will. Thread-safe."""

    TOKENS = 65536  # of a conversation, the newest results
    LONGEST = 1 << 18  # characters of one result
    REMEMBERED = 8 * 2**20  # bytes of the tokens of results

    def __init__(self, tokenizer: TextTokenizer, format: OutputFormat):
        self._tokenizer = tokenizer
        syntaxes = format.syntaxes[:1]
        self._escapes = format.parse is not None or any(
            isinstance(one, ObjectSyntax) and len(one.quotes[0]) == 1 for one in syntaxes
        )
        self._spelt: BoundedMap[array.array[int]] = BoundedMap(
            self.REMEMBERED, lambda key, tokens: sys.getsizeof(key) + sys.getsizeof(tokens) + ENTRY
        )

    def tokens(self, messages: list[Message]) -> list[int]:
        """The tokens of what differs in spelling from the prompt, the newest last."""
        results: list[array.array[int]] = []
        left = self.TOKENS
        for message in reversed(messages):
            text = message["content"]
            if message["role"] == "tool" and len(text) <= self.LONGEST and left > 0:
                key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
                spelt = self._spelt.get_or_make(key, functools.partial(self._spell, text))
                results.append(spelt[:left])
                left -= len(results[-1])
        return [token for tokens in reversed(results) for token in tokens]

    def _spell(self, text: str) -> array.array[int]:
        escape, encode = self._tokenizer.control_tokens.escape, self._tokenizer.encode
        spellings = _spellings(text, self._escapes)
        return array.array("I", (token for one in spellings for token in encode(escape(one))))


def _spellings(text: str, escapes: bool) -> Iterator[str]:
    plain = without_numbers(text)
    if plain != text:
        yield plain
    if escapes and (escaped := json.dumps(plain, ensure_ascii=False)[1:-1]) != plain:
        yield escaped


def without_numbers(text: str) -> str:
    """A text without the numbers before its lines. Only numbers that go up one by one from line to
    line are taken for such."""
    lines, last = text.split("\n"), None
    matches = [_NUMBERED.match(line) for line in lines]
    for at, match in enumerate(matches):
        number = int(match[1][:9]) if match else None
        follows = next(iter(matches[at + 1 : at + 2]), None)
        numbered = number is not None and (
            last == number - 1 or follows is not None and follows[1] == str(number + 1)
        )
        if match and numbered:
            lines[at] = lines[at][match.end() :]
        last = number if numbered else None
    return "\n".join(lines)
