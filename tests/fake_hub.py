"""A Hugging Face hub on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """A hub of repos {name: {file: content}}: an API that lists them, and files behind a redirect
    to another host, as https://huggingface.co/docs/hub/api has it.

    `listed` is what the list says of repos beside their names, `cards` what their pages say,
    `sizes` are those of repos' weights that are told instead of the true ones.

    `asked` are methods and paths, with their Range and Authorization. `cut` is how many bytes of a
    file arrive before the connection ends, `cuts` how often that happens. `pause` is in seconds,
    after every 100 kB. `status` is what the API says instead of an answer, `commit` every repo's
    last one, `damage` a function of a file's name and content. With `xet`, weights are to be had
    from a Xet storage, which never answers."""

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = repos
        self.listed: dict[str, dict] = {}
        self.cards: dict[str, dict] = {}
        self.sizes: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = socket.create_server(("127.0.0.1", 0))
        self.reset()

    def reset(self) -> None:
        self.cut, self.cuts, self.pause = None, 10**9, 0.0
        self.status, self.commit, self.xet = None, COMMIT, False
        self.damage = lambda name, content: content
        self.asked: list[tuple[str, str, str | None, str | None]] = []

    def server_close(self) -> None:
        super().server_close()
        self.storage.close()

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in that order."""
        return [path.split("/", 4)[4] for _, path, _, _ in self.asked if path.startswith("/cdn/")]


def demo_files() -> dict[str, bytes]:
    """The files of the built-in model, without the modules and the folder of compiled ones."""
    folder = Path(__file__).parent / "demo"
    paths = [path for path in folder.iterdir() if path.suffix not in ("", ".py")]
    return {path.name: path.read_bytes() for path in paths}


@contextlib.contextmanager
def serving(repos: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """A hub that answers."""
    hub = FakeHub(repos)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def digest(name: str, content: bytes) -> str:
    """How a hub calls a file's content: by SHA-256 for what Git LFS has, else as Git does."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url, hub = urlsplit(self.path), self.server
        if url.path == "/api/agent-harnesses":  # which programs the library knows, for its name
            return self.send_error(404)
        hub.asked.append(
            (self.command, url.path, self.headers["Range"], self.headers["Authorization"])
        )
        parts = url.path.split("/")
        if parts[1] == "cdn":
            return self.send_file("/".join(parts[4:]), "/".join(parts[2:4]))
        if hub.status:
            return self.send_error(hub.status)
        if url.path == "/api/models":
            query = dict(parse_qsl(url.query))
            found = [{"id": repo, **hub.listed.get(repo, {})} for repo in hub.repos]
            found.sort(key=lambda model: -model.get("downloads", 0))
            found = [one for one in found if query.get("search", "").lower() in one["id"].lower()]
            return self.send_json(found[: int(query.get("limit", 1000))])
        repo = "/".join(parts[3:5] if parts[1] == "api" else parts[1:3])
        if repo not in hub.repos:
            return self.send_error(401)
        if parts[5:6] == ["xet-read-token"]:
            return self.send_token()
        if parts[1] == "api":
            return self.send_json(self.described(repo))
        self.redirect(repo, "/".join(parts[5:]))

    def described(self, repo: str) -> dict:
        files = []
        for name, content in self.server.repos[repo].items():
            file = {"rfilename": name, "size": len(content), "blobId": "b" * 40}
            if name.endswith(".safetensors"):
                file["size"] = self.server.sizes.get(repo, len(content))
                file["lfs"] = {
                    "sha256": digest(name, content),
                    "size": file["size"],
                    "pointerSize": 130,
                }
            else:
                file["blobId"] = digest(name, content)
            files.append(file)
        config = json.loads(self.server.repos[repo].get("config.json", b"{}"))
        kept = {key: config[key] for key in ("architectures", "model_type") if key in config}
        about = {"config": kept, "siblings": files, "cardData": self.server.cards.get(repo)}
        return {"id": repo, "sha": self.server.commit, **about}

    def redirect(self, repo: str, name: str) -> None:
        content = self.server.repos[repo][name]
        self.send_response(302)
        self.send_header(
            "Location", f"http://localhost:{self.server.server_port}/cdn/{repo}/{name}"
        )
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("X-Linked-Etag", f'"{digest(name, content)}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", "0")
        if self.server.xet and name.endswith(".safetensors"):
            route = f"{self.server.url}/api/models/{repo}/xet-read-token/{self.server.commit}"
            self.send_header("X-Xet-Hash", "ab" * 32)
            self.send_header("X-Xet-Refresh-Route", route)
        self.end_headers()

    def send_token(self) -> None:
        self.send_response(200)
        port = self.server.storage.getsockname()[1]
        self.send_header("X-Xet-Cas-Url", f"http://127.0.0.1:{port}")
        self.send_header("X-Xet-Access-Token", "token")
        self.send_header("X-Xet-Token-Expiration", str(int(time.time()) + 3600))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, body: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def send_file(self, name: str, repo: str) -> None:
        hub = self.server
        content = hub.damage(name, hub.repos[repo][name])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        end = int(wanted[2]) + 1 if wanted and wanted[2] else len(content)
        rest = content[int(wanted[1]) if wanted else 0 : end]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if hub.cut is not None and hub.cuts > 0 and len(rest) > hub.cut:
            hub.cuts -= 1
            rest = rest[: hub.cut]
        with contextlib.suppress(OSError):  # the client went away
            for start in range(0, len(rest), 100_000):
                self.wfile.write(rest[start : start + 100_000])
                time.sleep(hub.pause)

    def log_message(self, *_: object) -> None:
        pass
