"""PDFs without text: for a model that sees, their pages are images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import threading

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.images.images import MARK, MAX_IMAGES, image_mark
from _mlx_server.inference.images.pdf import MAX_DRAWN, PDFError, draw_pdf
from _mlx_server.inference.protocol import Message, Request, Scan

log = logging.getLogger("mlx_server")

_KEPT = 64 << 20  # bytes of pages: a conversation comes with every request
_DRAWING = threading.Lock()  # one file is drawn at a time


def unfold_scans(request: Request, *, sees: bool) -> tuple[Request, dict[str, bytes]]:
    """The request with marks for the pages of its scans, or with their notes where the model does
    not see or pages cannot be drawn, and the files of all its images by their marks. No more pages
    are shown than images are allowed."""
    files: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for mark, file in request.images.items():
        if not isinstance(file, Scan):
            files[mark] = file
            continue
        pages, count = _pages(file) if sees else ((), 0)
        if not any(pages) or len(files) + len(pages) > MAX_IMAGES:
            _log_once(file.note)
            texts[mark] = file.note
            continue
        texts[mark] = _text(pages, count)
        files |= {image_mark(page): page for page in pages if page}
    if not texts:
        return request, files

    def unfolded(message: Message) -> Message:
        content = MARK.sub(lambda found: texts.get(found[0], found[0]), message["content"])
        return {**message, "content": content}

    return dataclasses.replace(request, messages=list(map(unfolded, request.messages))), files


@functools.lru_cache(4096)
def _log_once(note: str) -> None:
    log.info("%s", note)


def _text(pages: tuple[bytes, ...], count: int) -> str:
    """What stands for a scan with so many pages, of which some are shown."""
    lines = [f"[PDF, pages: {count}]"]
    for number, page in enumerate(pages, 1):
        lines += [f"[page {number}]", image_mark(page) if page else "[this page cannot be shown]"]
    if len(pages) < count:
        lines.append(f"[all other pages omitted: at most {MAX_DRAWN} are shown]")
    return "\n".join(lines)


_PAGES: BoundedMap[tuple[tuple[bytes, ...], int]] = BoundedMap(
    _KEPT, lambda key, value: len(key) + sum(map(len, value[0]))
)


def _pages(scan: Scan) -> tuple[tuple[bytes, ...], int]:
    """The files of a scan's first pages, b"" for one that cannot be drawn, and how many pages there
    are."""
    key = hashlib.sha256(scan.content).hexdigest()
    found = _PAGES.get(key)
    if found is None:
        with _DRAWING:
            found = _PAGES.get(key)  # another request may have drawn them meanwhile
            if found is None:
                found = _drawn(scan.content)
                _PAGES.put(key, found)
    return found


def _drawn(content: bytes) -> tuple[tuple[bytes, ...], int]:
    try:
        pages, count = draw_pdf(content)
    except PDFError as error:
        log.warning("a PDF without text is not shown: it %s", error)
        return (), 0
    return tuple(pages), count
