"""The page that a browser gets: which files it consists of, and what it may do."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("page")
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
ROUTES = {f"/page/{name}": name for name in KINDS if name != "index.html"}
"""Where the page's other files are, by route."""
HEADERS = {
    "Cache-Control": "no-cache",
    # https://www.w3.org/TR/CSP3/: nothing inline, nothing from elsewhere, in no other page's frame
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def wants_page(accept: str) -> bool:
    """Whether it is a browser that asks, by its Accept header."""
    return "text/html" in accept


def page_file(name: str) -> tuple[bytes, str]:
    """One of the page's files and its Content-Type."""
    return (FOLDER / name).read_bytes(), KINDS[name]
