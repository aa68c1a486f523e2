"""Checks of a request's head: its framing, where it comes from, and its key."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from email.message import Message
from urllib.parse import urlsplit

from _mlx_server.inference.protocol import Priority
from _mlx_server.wire.fields import WireError

HOST = re.compile(r"([\w.-]*|\[[\da-f:.]+\])(:\d{1,5})?", re.I | re.A)
# Other servers read other blanks and characters in their own ways (RFC 9112, 3; RFC 9110, 5.5)
REQUEST_LINE = re.compile(r"[!#$%&'*+.^`|~\w-]+ [^\x00-\x20\x7f]+ HTTP/1\.\d", re.ASCII)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# By which containers reach the machine that they run on
CONTAINER_NAMES = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
LOCAL_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?"
    r"|(app|file|tauri|vscode-webview|vscode-file)://.*",
    re.I,
)


def framing_error(line: str, headers: Message, version: str) -> str | None:
    """What is wrong with a head, or None. What another server might read in another way is wrong
    (RFC 9112, 3.2, 5 and 6.3). `line` is the request line, `version` what it says of that, such as
    "HTTP/1.1"."""
    if not REQUEST_LINE.fullmatch(line):
        return "malformed request line"
    hosts, origins, lengths, codings = (
        headers.get_all(name, [])
        for name in ("Host", "Origin", "Content-Length", "Transfer-Encoding")
    )
    if headers.defects or any(map(CONTROL.search, headers.values())):
        return "malformed header"
    if max(len(hosts), len(origins), len(lengths + codings)) > 1:
        return "Host, Origin and the body's length can be given only once"
    if not hosts and version > "HTTP/1.0":
        return "the Host header is missing"
    if not all(map(HOST.fullmatch, hosts)):
        return "malformed Host header"
    if codings and version <= "HTTP/1.0":
        return "HTTP/1.0 has no Transfer-Encoding"
    if codings and codings[0].lower() != "chunked":
        return f"Transfer-Encoding '{codings[0]}' is not supported"
    return None


def has_body(headers: Message) -> bool:
    """Whether a body follows the head."""
    return "Content-Length" in headers or "Transfer-Encoding" in headers


def checked_origin(headers: Message, is_own: Callable[[str], bool]) -> str:
    """The Origin header, "" if there is none. Raises WireError for a web page's request that must
    not be answered: one with a foreign origin, or one whose Host header is not one of the server's
    own names, as `is_own` says (DNS rebinding)."""
    host, origin = headers.get("Host", ""), headers.get("Origin", "")
    try:
        name, foreign = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc != host
    except ValueError:
        raise WireError(400, "malformed Host or Origin header") from None
    if not is_own(name):
        raise WireError(403, f"Host '{name}' is not served here; --allow-host would allow it")
    if origin and foreign and not LOCAL_ORIGIN.fullmatch(origin):
        raise WireError(403, f"Origin '{origin}' is not allowed")
    return origin


def names_this_machine(host: str, loopback: bool) -> bool:
    """Whether `host`, in lower case, is a name of this machine that no one else can give to
    another address, or an address: a web page cannot have one that it did not come from. If the
    server listens at a `loopback` address, a public one cannot be its own."""
    if host in ("", "localhost", "127.0.0.1"):  # nearly always, and the rest takes time
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        own = socket.gethostname().lower()
        names = (own, f"{own.partition('.')[0]}.local", *CONTAINER_NAMES)
        return host in names or host.endswith(".localhost")
    return not loopback or address.is_loopback or address.is_private or address.is_unspecified


def check_key(headers: Message, keys: Mapping[str, Priority]) -> str:
    """The request's API key: the x-api-key header or a bearer token; of two that are valid the one
    for the higher priority. Raises WireError if it is none of `keys`."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    bearer = token if scheme.lower() == "bearer" else ""
    # Blanks in bytes: as Latin-1, the last byte of a letter may be one
    given = [text.encode("latin-1").strip() for text in (headers.get("x-api-key", ""), bearer)]
    # Every key is compared, so that the time tells nothing
    found = [key for key in keys for one in given if hmac.compare_digest(one, key.encode())]
    if not found:
        raise WireError(401, "invalid x-api-key", {"x-should-retry": "false"})
    return min(found, key=lambda key: keys[key])
