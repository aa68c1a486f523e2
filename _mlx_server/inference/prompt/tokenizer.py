"""A model's tokenizer."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.catalog.models import LocalModel, check_files, gap_marks, load_error
from _mlx_server.inference.images.image_layout import ImageLayout
from _mlx_server.inference.images.images import PLACED
from _mlx_server.inference.prompt.control_tokens import SPLIT, ControlTokens, alternatives
from _mlx_server.inference.protocol import InvalidRequest

# Where to cut a text: many tokenizers treat blanks at its beginning or end in their own way
_LINE_END = re.compile(r".*\n(?=\S)", re.DOTALL)
_WITHIN_WORD = re.compile(r".*\S(?=\S)", re.DOTALL)


class TextTokenizer:
    """A model's tokenizer, which encodes a long prompt that has grown at the cost of its growth.

    Text is cut at special tokens, and the encodings of the pieces between them are remembered. This
    needs a tokenizer that encodes such pieces independently; for any other one the text is encoded
    as a whole. What ControlTokens has escaped becomes the tokens of plain text: it is encoded in
    parts, of which none holds a special token. A mark that is PLACED becomes the tokens of an
    image, by the model's `layout`, which may be set later. `wrapped` is mlx-lm's TokenizerWrapper.
    Safe to use from any thread."""

    REMEMBERED = 32 * 2**20  # bytes of pieces of text and their tokens
    LONG = 2**18  # characters that are encoded at once, which takes two hundred times their bytes
    MAX_SPECIAL = 1000  # characters of a special token: a pattern is made of all
    LEADS = ("", "\n", "<", ".")  # see _find_lead

    def __init__(self, wrapped: Any, layout: ImageLayout | None = None):
        self.wrapped, self.layout = wrapped, layout
        self._core = _core(wrapped)
        self.control_tokens = ControlTokens(wrapped)
        self._lead = self._find_lead()
        self._pieces: BoundedMap[array[int]] = BoundedMap(self.REMEMBERED, _remembered_bytes)
        self._special_tokens = self._find_special_tokens()

    @classmethod
    def load(cls, local: LocalModel) -> TextTokenizer:
        """Reads a model's tokenizer from its files. Raises ModelLoadError."""
        from mlx_lm.utils import load_tokenizer
        from transformers import CONFIG_MAPPING, PreTrainedConfig

        # Without this, transformers asks on the terminal whether code of the model may be run.
        options: dict[str, Any] = {"trust_remote_code": False}
        eos_token_ids = local.config.get("eos_token_id")
        try:
            check_files(local)
            # transformers would check the config of a type that only mlx-lm knows by the rules of
            # another type, and maybe refuse it. The tokenizer does not need the config.
            if local.config.get("model_type") not in CONFIG_MAPPING:
                options["config"] = PreTrainedConfig()
            wrapped = load_tokenizer(  # type: ignore[no-untyped-call]
                local.path, options, eos_token_ids=eos_token_ids
            )
            added = wrapped.added_tokens_decoder.values()
            if any(len(token.content) > cls.MAX_SPECIAL for token in added):
                raise ValueError("a special token is too long")
            return cls(wrapped)
        except BaseException as error:
            # What panics in Rust is no Exception: https://pyo3.rs/latest/function/error-handling
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise load_error(local, f"the tokenizer of model '{local.name}'", error) from error

    def encode(self, text: str, most: float = math.inf) -> list[int]:
        """The token ids of a text in which special tokens are recognised unless they are escaped;
        none are added. If they are more than `most`, some at the end may be missing."""
        return list(itertools.chain.from_iterable(_until(most, self._encode_marked(text))))

    def _encode_marked(self, text: str) -> Iterator[Sequence[int]]:
        """The token ids of a text with the marks of images, part by part, as all that follow."""
        if self.layout is None or not PLACED.search(text):
            yield from self._encode_text(text)
            return
        around = self.layout.around
        first, *rest = PLACED.split(PLACED.sub(rf"{around}\g<0>{around}", text))
        yield from self._encode_text(first)
        for at in range(0, len(rest), 4):
            token, rows, columns = map(int, rest[at : at + 3])
            yield self.layout.tokens(-token, rows, columns)
            yield from self._encode_text(rest[at + 3])

    def _encode_text(self, text: str) -> Iterator[Sequence[int]]:
        pieces = self._special_tokens.split(text) if self._special_tokens else [text]
        for piece in filter(None, pieces):
            if len(piece) > self.LONG or not self._special_tokens:
                yield from self._encode_parts(piece)
            else:
                yield self._pieces.get_or_make(piece, functools.partial(self._encode_piece, piece))

    def _encode_piece(self, piece: str) -> array[int]:
        return array("I", itertools.chain.from_iterable(self._encode_parts(piece)))

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        """The token ids of a text that may hold SPLIT, at which it is cut, as it is where it is
        too long."""
        parts = (piece for part in _split(text) for piece in cut(part, self.LONG))
        if first := next(parts):
            yield self._encode_whole(first)
        for part in filter(None, parts):
            yield self._encode_behind(self._lead, part)

    def _encode_behind(self, lead: str, text: str) -> list[int]:
        """The token ids of a text that is not the first one: those behind the tokens of `lead`."""
        before = self._encode_whole(lead) if lead else []
        tokens = self._encode_whole(lead + text)
        if tokens[: len(before)] == before:
            return tokens[len(before) :]
        return self._encode_whole(text)

    def _find_lead(self) -> str:
        """A text with which another one is encoded as it is in the middle of a text: many
        tokenizers put a blank in front of the first word."""
        first, second = "a<", "|b|> c"
        expected = self.decode(self._encode_whole(first + second))
        for lead in self.LEADS:
            tokens = self._encode_whole(first) + self._encode_behind(lead, second)
            if self.decode(tokens) == expected:
                return lead
        return ""

    def _encode_whole(self, text: str) -> list[int]:
        tokens: list[int]
        if self._core is None:
            tokens = self.wrapped.encode(text, add_special_tokens=False)
        else:
            [encoding] = self._core.encode_batch_fast([text], add_special_tokens=False)
            tokens = encoding.ids
        return tokens

    def _find_special_tokens(self) -> re.Pattern[str] | None:
        """A pattern that cuts text at the special tokens; None if this tokenizer does not encode
        the pieces independently."""
        added = getattr(self.wrapped, "added_tokens_decoder", {}).values()
        names = [
            token.content
            for token in added
            if token.content.strip()
            and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        ]
        if not names:
            return None
        pattern = re.compile(f"({alternatives(names)})")
        probe = f" a{names[0]} b\n{names[-1]}\nc  d{names[0]}{names[-1]} é"
        pieces = map(self._encode_whole, filter(None, pattern.split(probe)))
        encoded = list(itertools.chain.from_iterable(pieces))
        return pattern if encoded == self._encode_whole(probe) else None

    def last_special_token_end(self, text: str, start: int, end: int) -> int | None:
        """Where the last special token within text[start:end] ends; None if there is none, or the
        text is not cut at special tokens."""
        if self._special_tokens is None:
            return None
        ends = [found.end() for found in self._special_tokens.finditer(text, start, end)]
        return ends[-1] if ends else None

    @property
    def end_tokens(self) -> set[int]:
        """The tokens that end an answer."""
        tokens: set[int] = self.wrapped.eos_token_ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, images left out."""
        text: str = self.wrapped.decode([token for token in tokens if token >= 0])
        return text

    def without_images(self, text: str) -> str:
        """A text whose images are as `decode` writes them."""
        if self.layout is None or not PLACED.search(text):
            return text
        shown = self.decode(self.layout.tokens(-1, 1, 1))
        return PLACED.sub(f"{self.layout.around}{shown}{self.layout.around}", text)

    def special_token_names(self) -> dict[int, str]:
        """The texts of the tokens that were added to the vocabulary, by their ids."""
        return {id: token.content for id, token in self.wrapped.added_tokens_decoder.items()}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token. mlx-lm's detokenizers have a table of them for most models."""
        table = getattr(self.wrapped.detokenizer, "tokenmap", None)
        if table is None:
            return self.decode([token]).encode()
        # Some models have more logits than tokens
        written: str | bytes = table[token] if token < len(table) else ""
        if isinstance(written, bytes):  # SentencePiece
            return written.replace("\u2581".encode(), b" ")
        return b"".join(_bytes_by_letter().get(letter) or letter.encode() for letter in written)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises InvalidRequest for ids that no token has."""
        count = len(self.wrapped)  # takes longer than the rest
        for token in tokens:
            if not 0 <= token < count:
                raise InvalidRequest(f"the model has no token {token}")

    def gap_tokens(self) -> tuple[str, ...]:
        """The special tokens of a text with a gap, as text: those before the text in front of the
        gap, before the text behind it, and at the end. Raises InvalidRequest if the model has none.
        """
        marks = gap_marks(self.special_token_names().values())
        if not marks:
            raise InvalidRequest(
                "this model cannot fill a gap: its tokenizer has no tokens for that"
            )
        return marks

    def encode_raw(self, text: str, most: float = math.inf) -> list[int]:
        """The token ids of a text that no template has rendered, with the special tokens that the
        tokenizer adds to it. If they are more than `most`, some in front of the last one may be
        missing."""
        first, *rest = cut(text, self.LONG)
        tokens: list[int] = self.wrapped.encode(first)
        if not rest:
            return tokens
        added = tokens[-1:] != self._encode_whole(first)[-1:]
        end = [tokens.pop()] if added else []
        parts = (self._encode_behind(self._lead, part) for part in rest)
        return list(itertools.chain(tokens, *_until(most - len(tokens), parts), end))


def _core(wrapped: Any) -> Any:
    """The `tokenizers.Tokenizer` that does all the work of a tokenizer's `encode`; None if this
    tokenizer does more, or has none. Asking it directly takes a fifth less time: transformers has
    masks and offsets made that nobody needs."""
    from transformers import PreTrainedTokenizerFast

    wrapped.encode("a")  # ends truncation and padding, which tokenizer.json may have
    kind = type(getattr(wrapped.encode, "__self__", None))
    plain = issubclass(kind, PreTrainedTokenizerFast) and all(
        inspect.getattr_static(kind, name) is inspect.getattr_static(PreTrainedTokenizerFast, name)
        for name in ("encode", "_encode_plus")
    )
    return wrapped.backend_tokenizer if plain else None


def _split(text: str) -> Iterator[str]:
    """A text cut at SPLIT. Of one that will be too long most parts are never asked for."""
    start = 0
    while (end := text.find(SPLIT, start)) >= 0:
        yield text[start:end]
        start = end + len(SPLIT)
    yield text[start:]


def cut(text: str, size: int) -> list[str]:
    """A text in parts of at most `size` characters, of which the others begin a line if possible,
    and with no blank if that is possible."""
    parts, start = [], 0
    while len(text) - start > size:
        bounds = start + size // 2, start + size
        found = _LINE_END.match(text, *bounds) or _WITHIN_WORD.match(text, *bounds)
        end = found.end() if found else start + size
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _until(most: float, parts: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    """The first parts that have more than `most` tokens together, or all."""
    count = 0
    for part in parts:
        yield part
        count += len(part)
        if count > most:
            return


def _remembered_bytes(text: str, tokens: array[int]) -> int:
    return 4 * (len(text) + len(tokens)) + 256


@functools.cache
def _bytes_by_letter() -> dict[str, bytes]:
    """Byte-level vocabularies write each byte as a letter."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {letter: bytes([byte]) for byte, letter in letters.items()}
