"""The text of a PDF, read by pypdf, and the pages of one that has none, drawn by pypdfium2, each in
a process of its own.

A hostile file can keep a parser busy for hours, let it fill the memory or, if it is not written in
Python, make it crash. A process can be limited and ended. `read_pdf` and `draw_pdf` start it and
wait for it; `main` is what it runs: it reads the file from stdin and writes one JSON object to
stdout.

This file is also run as a script, so it imports nothing of this package."""

from __future__ import annotations

import base64
import contextlib
import contextvars
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MAX_PAGES = 100
MAX_CHARACTERS = 100_000
MAX_SECONDS = 20  # of a processor
MAX_MEMORY = 1 << 30  # bytes
MAX_DRAWN = 20  # pages
MAX_DRAWN_BYTES = 16 << 20  # of all pages' files
NICE = 10  # beside models on the same processors it gets about a tenth of one
PATIENCE = 3  # times as long as a file may take, it is waited for

_DRAWN_SCALE = 150 / 72  # dots by point: a line of a letter has about as many as on a screen
_DRAWN_PIXELS = 2_200_000  # of a page at most: A4 at this scale
_NARROW = 100  # longer side by shorter side of a page that is not drawn
_WATCH_SECONDS = 0.05  # between two looks at the memory
# What Python needs to find itself and its packages. Keys and tokens stay with the server: a file
# may get the better of its parser.
_INHERITED = re.compile(
    r"PATH|HOME|USER|TMPDIR|LANG|LC_\w+|PYTHON\w+|VIRTUAL_ENV|CONDA_PREFIX|__PYVENV_LAUNCHER__"
    r"|LD_LIBRARY_PATH|DYLD_\w+"
)
_MODULES = {"text": ["pypdf"], "pages": ["pypdfium2", "PIL.Image", "PIL.JpegImagePlugin"]}


IS_CLIENT_GONE: contextvars.ContextVar[Callable[[], bool]] = contextvars.ContextVar(
    "IS_CLIENT_GONE", default=lambda: False
)
"""Says in a thread that answers a client whether that has gone. A request may have hundreds of
files, each of which takes MAX_SECONDS."""


FILE_TURN: contextvars.ContextVar[Callable[[], contextlib.AbstractContextManager[None]]] = (
    contextvars.ContextVar("FILE_TURN", default=contextlib.nullcontext)
)
"""In a thread that answers a client, what makes a context within which a file is read or drawn: it
waits for the request's turn to do so. It bounds how many processes there are."""


class PDFError(Exception):
    """A PDF cannot be read; the message says why, in words that fit behind "it"."""


class NoTextError(PDFError):
    """A PDF has no text."""


@functools.cache
def can_read_pdf() -> bool:
    """Whether pypdf is installed: the extra `documents`."""
    return importlib.util.find_spec("pypdf") is not None


@functools.cache
def can_draw_pdf() -> bool:
    """Whether pypdfium2 is installed: the extra `scans`."""
    return importlib.util.find_spec("pypdfium2") is not None


def read_pdf(data: bytes, seconds: float = MAX_SECONDS, memory: int = MAX_MEMORY) -> str:
    """The text of a PDF with the number of each page before it, at most MAX_PAGES and
    MAX_CHARACTERS of it. Raises PDFError, also if the file takes a processor longer than `seconds`
    or needs more than `memory` bytes."""
    found = _run("text", data, seconds, memory)
    return _with_page_numbers(found["pages"], found["count"], found["cut"])


def draw_pdf(
    data: bytes, seconds: float = MAX_SECONDS, memory: int = MAX_MEMORY
) -> tuple[list[bytes], int]:
    """JPEG files of the first pages of a PDF, at most MAX_DRAWN and MAX_DRAWN_BYTES, and how many
    pages there are. A page that cannot be drawn is b"". Raises PDFError as `read_pdf` does."""
    found = _run("pages", data, seconds, memory)
    return [base64.b64decode(page) for page in found["pages"]], found["count"]


def _run(task: str, data: bytes, seconds: float, memory: int) -> dict[str, Any]:
    """What the process finds. Raises ConnectionAbortedError if nobody waits for it any more."""
    if IS_CLIENT_GONE.get()():
        raise ConnectionAbortedError("the client has gone")
    # Without -P the modules beside this file would hide others of the same name
    command = [sys.executable, "-P", os.path.abspath(__file__), task, str(seconds), str(memory)]
    try:
        out = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE * seconds,
            env=_environment(),
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise PDFError(f"takes more than {PATIENCE * seconds:g} seconds to read") from None
    try:
        found: dict[str, Any] = json.loads(out.stdout)
    except ValueError:  # the process was ended by one of its limits
        raise PDFError("takes too much memory or time to read") from None
    if "error" in found:
        raise (NoTextError if found.get("scan") else PDFError)(found["error"])
    return found


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
    if paths := inherited.get("PYTHONPATH"):  # from the folder that the server was started in
        absolute = map(os.path.abspath, paths.split(os.pathsep))
        inherited["PYTHONPATH"] = os.pathsep.join(absolute)
    return inherited


def _with_page_numbers(pages: list[str], count: int, cut: bool) -> str:
    """The text of `pages`, which are the first of `count`. With `cut` the last one is not whole."""
    lines = [f"[PDF, pages: {count}]"]
    for number, text in enumerate(pages, 1):
        lines += [f"[page {number}]", text]
    if cut or len(pages) < count:
        left_out = f"the rest of page {len(pages)} and what follows" if cut else "all other pages"
        limits = f"{MAX_PAGES} pages and {MAX_CHARACTERS:,} characters"
        lines.append(f"[{left_out} omitted: at most {limits} are read]")
    return "\n".join(filter(None, lines))


def main() -> None:
    """What the process runs."""
    task, seconds, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    with contextlib.suppress(AttributeError, OSError):  # not every system knows it
        os.nice(NICE)
    # While files may be written: to compile the modules each time takes longer than many a PDF
    for module in _MODULES[task]:
        importlib.import_module(module)
    _limit(seconds, memory)
    try:
        found = {"text": _extract, "pages": _draw}[task](sys.stdin.buffer.read())
    except MemoryError:
        found = {"error": "takes too much memory to read"}
    except Exception:  # all kinds are raised for a damaged file
        found = {"error": "is damaged or no PDF"}
    print(json.dumps(found))


def _limit(seconds: float, memory: int) -> None:
    """Bounds what this process may take. Systems that refuse a limit, as macOS does for memory,
    have the thread that watches it."""
    cpu = int(seconds) + 1
    limits = (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),  # it would hold the file, and lie where others find it
    )
    for kind, limit in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    threading.Thread(target=_watch, args=(memory,), daemon=True).start()


def _watch(memory: int) -> None:
    start = _peak()  # on Linux a new process begins with the peak of the one that started it
    while _peak() - start < memory:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _peak() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _extract(data: bytes) -> dict[str, Any]:
    """The texts of the pages, how many pages there are, and whether the last text is cut; or why
    there are none."""
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not _is_open(reader):
        return {"error": "is encrypted"}
    texts: list[str] = []
    left = MAX_CHARACTERS
    for page in itertools.islice(reader.pages, MAX_PAGES):
        text = _page_text(page)
        texts.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    count = len(reader.pages)
    if not any(texts):
        error = f"has {count} page{'s' * (count != 1)} without text, as scans have"
        return {"error": error, "scan": True}
    return {"pages": texts, "count": count, "cut": left < 0}


def _is_open(reader: Any) -> bool:
    """Whether an encrypted file can be read without a password."""
    with contextlib.suppress(Exception):  # also if the cipher's package is not installed
        return bool(reader.decrypt(""))
    return False


def _page_text(page: Any) -> str:
    try:
        text: str = page.extract_text()
    except MemoryError:
        raise
    except Exception:  # one damaged page does not spoil the others
        return "[this page cannot be read]"
    # Half a surrogate pair cannot be encoded
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def _draw(data: bytes) -> dict[str, Any]:
    """The files of the pages, in base64, and how many pages there are."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    count, left = len(document), MAX_DRAWN_BYTES
    pages: list[str] = []
    for number in range(min(count, MAX_DRAWN)):
        try:
            page = _draw_page(document[number])
        except MemoryError:
            raise
        except Exception:  # one damaged page does not spoil the others
            page = b""
        left -= len(page)
        if left < 0:
            break
        pages.append(base64.b64encode(page).decode())
    return {"pages": pages, "count": count}


def _draw_page(page: Any) -> bytes:
    width, height = page.get_size()
    if not 0 < max(width, height) <= _NARROW * min(width, height):
        return b""
    scale = min(_DRAWN_SCALE, math.sqrt(_DRAWN_PIXELS / (width * height)))
    file = io.BytesIO()
    page.render(scale=scale).to_pil().convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
