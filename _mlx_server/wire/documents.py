"""Files and other content of a conversation that the model cannot take as it is: their text, or a
note in their place.

What is in a conversation comes with every later request. So content that cannot be used never makes
a request fail: the model gets a note that says what was there. The same content always gives the
same text, or the prompt would not be found in the cache."""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.images.pdf import (
    FILE_TURN,
    NoTextError,
    PDFError,
    can_draw_pdf,
    can_read_pdf,
    read_pdf,
)
from _mlx_server.wire.fields import Object, WireError, field

log = logging.getLogger("mlx_server")

_ELSEWHERE = "it is kept elsewhere, and this server does not fetch it"
_TEXT_TYPE = re.compile(r"text/.*|application/(?:.*[+./-])?(?:json|xml|ya?ml|javascript|toml|sql)")
_BLANKS = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"
_PIECE = 65536  # characters that are decoded at once
_LONGEST = 200  # characters of what a client says in a note, such as a name or a media type
_PDFS: BoundedMap[str | PDFError] = BoundedMap(64)  # the texts of PDFs by the files' hashes

OnScan = Callable[[bytes, str], str]
"""Takes a PDF without text, and the note for it; returns what stands for it."""


def omitted(path: str, kind: str, reason: str, name: str | None = None) -> str:
    """A note to the model in place of what stands at `path` in the body. `name` is what the client
    calls it. The log says the same, once."""
    note = _note(kind, reason, name)
    _log_once(path, note)
    return note


def _note(kind: str, reason: str, name: str | None) -> str:
    texts = (text[: 10 * _LONGEST] for text in (kind, reason, name or ""))
    kind, reason, name = (" ".join(text.split())[:_LONGEST] for text in texts)
    return f"[{kind} omitted: {name + ': ' if name else ''}{reason}]"


@functools.lru_cache(4096)
def _log_once(path: str, note: str) -> None:
    """A conversation comes with every request, and its notes would fill the log."""
    log.info("%s: %s", path, note)


def image_note(path: str) -> str:
    """The note in place of an image."""
    return omitted(path, "image", "this model cannot see images")


def elsewhere(path: str, kind: str, *names: str | None) -> str:
    """The note in place of what the client only refers to, by the first of `names` that is one."""
    return omitted(path, kind, _ELSEWHERE, next(filter(None, names), None))


def unknown(path: str, kind: str) -> str:
    """The note in place of content whose type, `kind`, means nothing here."""
    return omitted(path, kind, "this server cannot use it")


def file_text(file: Object, path: str, on_scan: OnScan) -> str:
    """The text of a file that OpenAI's APIs have in a part, at `path`, or a note. The bytes are in
    `file_data`, as base64 or a data URL. A PDF without text goes to `on_scan`. Raises WireError
    400."""
    data, id, url, name = (
        field(file, key, str, path) for key in ("file_data", "file_id", "file_url", "filename")
    )
    if data is None:
        return elsewhere(path, "file", name, url, id)
    media_type = ""
    if data.startswith("data:"):
        head, _, data = data.partition(",")
        media_type = head.removeprefix("data:").partition(";")[0]
        if not re.search(r";base64(?:;|\Z)", head):
            data = base64.b64encode(_unquoted(data)).decode()
    text = document_text(data, media_type, f"{path}.file_data", name, on_scan)
    return "\n".join(filter(None, [name, text]))


def document_text(
    data: str, media_type: str, path: str, name: str | None, on_scan: OnScan | None
) -> str:
    """The text of a file of a media type, which may be "", or a note. `data` is base64 and stands
    at `path`. A PDF without text goes to `on_scan`, if that is given. Raises WireError 400 if it
    is not base64."""
    content = _decoded(data, path)
    media_type = media_type.partition(";")[0].strip()[:_LONGEST].lower()
    if _TEXT_TYPE.fullmatch(media_type):
        return _any_text(content)
    if media_type == "application/pdf" or content.startswith(b"%PDF-"):
        return _pdf_text(content, path, name, on_scan)
    text = _plain_text(content)
    if text is not None:
        return text
    media_type = media_type[: _LONGEST // 2]
    kind = f"a file of type {media_type}" if media_type else "a file of an unknown type"
    return omitted(path, "document", f"{kind}, which this server cannot read", name)


def _decoded(data: str, path: str) -> bytes:
    try:
        return decode_base64(data)
    except ValueError:
        raise WireError(400, f"{path}: Input should be valid base64") from None


def decode_base64(data: str) -> bytes:
    """The bytes that base64 stands for, in which there may be blanks. Raises ValueError."""
    # Split at the blanks it would take twenty times its size
    return base64.b64decode(data.encode("ascii").translate(None, _BLANKS), validate=True)


def _unquoted(text: str) -> bytes:
    """The bytes of a text with percent-encoded ones. Piece by piece: each encoded byte is an object
    on the way."""
    pieces, start = [], 0
    while start < len(text):
        end = start + _PIECE
        cut = text.find("%", end - 2, end)  # an encoded byte is not cut
        end = cut if cut >= 0 and end < len(text) else end
        pieces.append(unquote_to_bytes(text[start:end]))
        start = end
    return b"".join(pieces)


def _plain_text(content: bytes) -> str | None:
    """The text that bytes are in UTF-8, or in UTF-16 with a byte order mark, None for others."""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _any_text(content: bytes) -> str:
    """The text of bytes that are said to be text."""
    text = _plain_text(content)
    return content.decode("cp1252", "replace").replace("\0", "") if text is None else text


def _pdf_text(content: bytes, path: str, name: str | None, on_scan: OnScan | None) -> str:
    if not can_read_pdf():
        reason = "a PDF, which this server cannot read without its extra 'documents'"
        return omitted(path, "document", reason, name)
    found = _read_once(content)
    if not isinstance(found, PDFError):
        return found
    reason = f"a PDF, which {found}"
    if isinstance(found, NoTextError) and on_scan is not None and can_draw_pdf():
        return on_scan(content, _note("document", reason, name))
    return omitted(path, "document", reason, name)


def _read_once(content: bytes) -> str | PDFError:
    """The text of a PDF, or why there is none."""
    key = hashlib.sha256(content).hexdigest()
    found = _PDFS.get(key)
    if found is not None:
        return found
    with FILE_TURN.get()():
        found = _PDFS.get(key)  # another request may have read it while this one waited
        if found is None:
            try:
                found = read_pdf(content)
            except PDFError as error:
                found = type(error)(*error.args)  # `error` holds the file, by its traceback
            _PDFS.put(key, found)
    return found
