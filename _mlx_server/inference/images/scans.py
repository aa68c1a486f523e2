"""PDFs without text: for a model that sees, their pages are images."""

from __future__ import annotations

import functools
import logging

from _mlx_server.inference.bounded import BoundedMap
from _mlx_server.inference.images.images import MAX_IMAGES, image_mark, replace_marks
from _mlx_server.inference.images.pdf import FILE_TURN, MAX_DRAWN, PDFError, draw_pdf
from _mlx_server.inference.protocol import Request, Scan

log = logging.getLogger("mlx_server")

_KEPT = 64 << 20  # bytes of pages: a conversation comes with every request


def unfold_scans(request: Request, *, sees: bool) -> tuple[Request, dict[str, bytes]]:
    """The request with marks for the pages of its scans, or with their notes where the model does
    not see or pages cannot be drawn, and the files of all its images by their marks. Scans in front
    of more images than are shown are not drawn."""
    files: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for mark, file in reversed(request.images.items()):
        if not isinstance(file, Scan):
            files[mark] = file
            continue
        pages, count = _pages(mark, file) if sees and len(files) < MAX_IMAGES else ((), 0)
        if not any(pages):
            _log_once(file.note)
            texts[mark] = file.note
            continue
        texts[mark] = _text(pages, count)
        files |= {image_mark(page): page for page in pages if page}
    return (replace_marks(request, texts) if texts else request), files


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


def _pages(mark: str, scan: Scan) -> tuple[tuple[bytes, ...], int]:
    """The files of a scan's first pages, b"" for one that cannot be drawn, and how many pages there
    are. `mark` stands for it."""
    found = _PAGES.get(mark)
    if found is None:
        with FILE_TURN.get()():
            found = _PAGES.get(mark)  # another request may have drawn them while this one waited
            if found is None:
                found = _drawn(scan.content)
                _PAGES.put(mark, found)
    return found


def _drawn(content: bytes) -> tuple[tuple[bytes, ...], int]:
    try:
        pages, count = draw_pdf(content)
    except PDFError as error:
        log.warning("a PDF without text is not shown: it %s", error)
        return (), 0
    return tuple(pages), count
