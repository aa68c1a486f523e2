"""Downloading models from a Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import http.client
import json
import logging
import math
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

from _mlx_server.front.upstream import error_text as why
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.models import shortcoming
from _mlx_server.inference.names import best_repo, parse_name
from _mlx_server.wire.fields import Object, WireError, field, is_type, items

log = logging.getLogger("mlx_server")


@dataclasses.dataclass
class RemoteFile:
    """A file of a repo: its size in bytes and its digest, SHA-256 of its content or, for small
    files, what Git has."""

    name: str
    size: int
    digest: str

    def progress(self, completed: int) -> Object:
        """Ollama's word on how many bytes of it are there."""
        return {
            "status": f"pulling {self.digest[:12]}",
            "digest": f"sha256:{self.digest}",
            "total": self.size,
            "completed": completed,
        }

    def hasher(self) -> Any:
        """What has `digest` in the end."""
        return (
            hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        )


class Hub:
    """The models of a Hugging Face hub ($HF_ENDPOINT, with $HF_TOKEN), and the folder they are
    downloaded to.

    https://huggingface.co/docs/hub/api,
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""

    # What a model is loaded from
    FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
    SILENCE = 60.0  # seconds without a byte after which a download has failed
    TELL = 0.2  # seconds between two reports of progress

    def __init__(self, cache: Path):
        self._cache = cache
        self._url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "")
        self._trust = ssl.create_default_context()
        # Python.org's Python knows no authorities; mlx-lm's packages bring some
        with contextlib.suppress(ImportError):
            import certifi

            self._trust.load_verify_locations(certifi.where())

    def pull(self, name: str) -> Generator[Object, None, None]:
        """Downloads the model that a name means, or what is missing of it, and yields Ollama's
        progress objects. Nothing is visible in the cache before all is there and checked. Raises
        WireError."""
        repo = self.find(name)
        commit, files = self._list(repo)
        yield {"status": "pulling manifest"}
        folder = self._cache / f"models--{repo.replace('/', '--')}"
        try:
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            missing = [file for file in files if not (folder / "blobs" / file.digest).exists()]
            yield from (file.progress(file.size) for file in files if file not in missing)
            needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
            if needed > free:
                raise WireError(
                    507, f"{repo} needs {needed} bytes, and {free} are free on the disk"
                )
            for file in missing:
                yield from self._download(
                    f"/{repo}/resolve/{commit}/{quote(file.name)}",
                    file,
                    folder / "blobs" / file.digest,
                )
            yield {"status": "verifying sha256 digest"}
            yield {"status": "writing manifest"}
            self._link(folder, commit, files)
        except OSError as error:
            raise WireError(
                500, f"{repo} cannot be written to the model cache: {why(error)}"
            ) from None
        log.info("pulled %s", repo)
        yield {"status": "success"}

    def size(self, repo: str) -> int:
        """Bytes of a repo's model. Raises WireError."""
        return sum({file.digest: file.size for file in self._list(repo)[1]}.values())

    def choose(self, name: str, memory: int) -> tuple[str, int, str]:
        """The repo that a name means to a machine whose GPU may use so many bytes, its size, and
        why. Where the name says no quantisation that is the 8-bit one, if half of the memory can
        hold it. Raises WireError."""
        repo = self.find(name)
        size, most = self.size(repo), f"the {gigabytes(memory)} of memory that can be used"
        if "/" in name or parse_name(name).bits:
            return repo, size, "as asked"
        if size > memory:
            raise WireError(
                507,
                f"{repo} takes {gigabytes(size)}, more than {most}; pull a smaller model, or just '{repo}'",
            )
        try:
            better = self.find(re.sub(r"(?i)[4-6](-?bit)", r"8\1", repo.partition("/")[2]))
        except WireError as error:
            if error.status != 404:
                raise
            better = repo
        if better == repo:
            return repo, size, "there is no 8-bit version"
        if (larger := self.size(better)) <= memory // 2:
            return better, larger, f"8-bit fits into half of {most}"
        return repo, size, f"8-bit takes {gigabytes(larger)}, more than half of {most}"

    def find(self, name: str) -> str:
        """The repo that a name means: itself, or the best of mlx-community's. Raises WireError if
        there is none."""
        plain = re.sub(r"^(hf\.co|huggingface\.co)/", "", name).removesuffix(":latest")
        if "/" in plain:
            return plain
        for words in dict.fromkeys((plain.partition(":")[0], re.match(r"[a-z]*", plain, re.I)[0])):
            query = urlencode(
                {"author": "mlx-community", "search": words, "sort": "downloads", "limit": 1000}
            )
            listed = self._ask(f"/api/models?{query}")
            repo = best_repo(plain, [one["id"] for one in listed if is_type(one.get("id"), str)])
            if repo:
                return repo
        raise WireError(
            404, f"mlx-community has no model '{name}'; any repo can be pulled as ORG/NAME"
        )

    def _list(self, repo: str) -> tuple[str, list[RemoteFile]]:
        """A repo's last commit and those of its files that are wanted."""
        info = self._ask(f"/api/models/{repo}/revision/main?blobs=true")
        commit, files = info.get("sha"), []
        for one in items(info, "siblings", dict):
            name, lfs = (
                field(one, "rfilename", str, required=True),
                field(one, "lfs", dict, default={}),
            )
            digest = lfs.get("sha256") or one.get("blobId")
            size = field(one, "size", int, required=True)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.FILES):
                files.append(RemoteFile(name, size, digest))
        if not all(
            re.fullmatch(r"[\da-f]{40}([\da-f]{24})?", str(one))
            for one in [commit, *(f.digest for f in files)]
        ) or any({"..", "/", ""} & {*PurePosixPath(file.name).parts, file.name} for file in files):
            raise WireError(
                502, f"the hub {self._url} describes {repo} in a way that makes no sense"
            )
        if not any(file.name.endswith(".safetensors") for file in files):
            names = [field(one, "rfilename", str) for one in items(info, "siblings", dict)]
            raise WireError(400, f"{repo} holds no MLX model: {shortcoming(names)}")
        return commit, files

    def _download(self, path: str, file: RemoteFile, blob: Path) -> Iterator[Object]:
        """Brings a file, or the rest of one that was begun, to `blob`."""
        part, told, hasher = blob.with_name(f"{blob.name}.incomplete"), -math.inf, file.hasher()
        with part.open("a+b") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WireError(409, f"{file.name} is being downloaded already") from None
            out.seek(0)
            while piece := out.read(1 << 20):
                hasher.update(piece)
            for piece in self._pieces(path, out, file.size) if out.tell() < file.size else ():
                if piece is None:  # from the beginning
                    hasher = file.hasher()
                    continue
                out.write(piece)
                hasher.update(piece)
                if time.monotonic() - told > self.TELL:
                    told = time.monotonic()
                    yield file.progress(out.tell())
            if out.tell() < file.size:
                raise WireError(
                    502,
                    f"{file.name} broke off after {out.tell()} of {file.size} bytes; pull again to go on",
                )
            if hasher.hexdigest() != file.digest:
                part.unlink()
                raise WireError(502, f"{file.name} has arrived damaged; pull again")
            os.replace(part, blob)
        yield file.progress(file.size)

    def _pieces(self, path: str, out: BinaryIO, size: int) -> Iterator[bytes | None]:
        """What follows in a file behind what `out` has; after None it is all of it."""
        with self._open(path, out.tell()) as answer:
            if out.tell() and answer.status != 206:
                out.truncate(0)
                yield None
            try:
                while piece := answer.read1(1 << 20):
                    yield piece
            except (OSError, http.client.HTTPException) as error:
                raise WireError(
                    502, f"the hub {self._url} failed: {why(error)}; pull again to go on"
                ) from None

    def _link(self, folder: Path, commit: str, files: list[RemoteFile]) -> None:
        """Makes downloaded files a snapshot, the one that `main` means."""
        for file in files:
            link = folder / "snapshots" / commit / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder / "blobs" / file.digest, link.parent))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    def _ask(self, path: str) -> Any:
        try:
            with self._open(path) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise WireError(502, f"the hub {self._url} failed: {why(error)}") from None

    def _open(self, path: str, start: int = 0) -> Any:
        """The hub's answer, from byte `start` on if it can. Raises WireError."""
        request = urllib.request.Request(
            self._url + path, headers={"Range": f"bytes={start}-"} if start else {}
        )
        if self._token:  # for the hub alone, not for where it keeps its files
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return urllib.request.urlopen(request, timeout=self.SILENCE, context=self._trust)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise WireError(
                    404,
                    f"the hub {self._url} says {error.code} to {path}: there is no such repo, or it takes "
                    "a token, in HF_TOKEN, that may read it",
                ) from None
            raise WireError(
                502, f"the hub {self._url} says {error.code} {error.reason} to {path}"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise WireError(
                502, f"the hub {self._url} cannot be asked: {why(getattr(error, 'reason', error))}"
            ) from None
