"""Files of a Hugging Face repo are brought into the cache by huggingface_hub, in a process of its
own.

A process can be ended at any moment, whether it waits for Python or for the Xet library; threads
cannot. It also keeps the download from taking time away from the thread that generates tokens.

`download` starts the process and reads from it; `main` is what the process runs. It reads one
`Order` as JSON from stdin and writes JSON objects to stdout, one a line: progress, and at last an
error if there was one."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _mlx_server.inference.catalog.hub_client import guard
from _mlx_server.inference.protocol import EngineError, first_line

_REPORT_SECONDS = 0.2  # between two reports of progress, whether or not there was any
_STOP_SECONDS = 5.0  # for the process to remove what it has not finished


class HubFailure(enum.Enum):
    """Why something could not be had from a hub."""

    NOT_FOUND = "no such model or repo"
    FORBIDDEN = "the repo may not be read"
    NO_MODEL = "the repo holds no MLX model"
    NO_SPACE = "the disk or the memory is too small"
    BUSY = "the repo is being downloaded already"
    UNREACHABLE = "the hub is offline, gives errors or nonsense, or broke off"
    UNWRITABLE = "the cache cannot be written"


class HubError(EngineError):
    """A hub did not give what was asked of it; `reason` says why in one word."""

    def __init__(self, reason: HubFailure, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo: its path in the repo, its size in bytes and its digest in hex, SHA-256 of
    its content for large files, else Git's SHA-1. The cache names blobs by these digests."""

    name: str
    size: int
    digest: str

    def matches(self, path: Path) -> bool:
        """Whether a file has this content."""

        def git_hash() -> Any:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

        kind = "sha256" if len(self.digest) == 64 else git_hash
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, kind).hexdigest() == self.digest


@dataclass(frozen=True)
class Span:
    """Bytes of a repo's file, from `start` up to `end`."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Order:
    """What is to be downloaded: files of a repo's commit, in this order, to a cache folder. With
    `spans` it is a single safetensors file of a new make: `header` and those bytes, to the path
    `target`."""

    repo: str
    commit: str
    cache: str
    files: list[RemoteFile]
    header: str = ""
    spans: list[Span] = field(default_factory=list)
    target: str = ""


def download(order: Order) -> Generator[tuple[RemoteFile, int]]:
    """Brings files into the cache and yields how many bytes of which file are there, several times
    a second. Closing the iterator stops the download. Raises HubError."""
    root = str(Path(__file__).parents[3])
    paths = filter(None, [root, os.environ.get("PYTHONPATH")])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "_mlx_server.inference.catalog.download"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"HF_HUB_VERBOSITY": "error", **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C does not reach it, but `_stop` does
    )
    assert process.stdin and process.stdout
    failure = HubError(
        HubFailure.UNREACHABLE, f"{order.repo} was not downloaded; pull again to go on"
    )
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            json.dump(dataclasses.asdict(order), stdin)
        for line in process.stdout:
            report = json.loads(line)
            if "error" in report:
                failure = HubError(HubFailure[report["reason"]], report["error"])
            else:
                yield order.files[report["file"]], report["completed"]
        if process.wait():
            raise failure
    finally:
        _stop(process)
        process.stdout.close()


def read_span(repo: str, commit: str, span: Span) -> Generator[bytes]:
    """Bytes of a repo's file, as they come. Raises exceptions of huggingface_hub, and ValueError if
    others come than were asked for."""
    from huggingface_hub import get_session, hf_hub_url

    left = span.end - span.start
    wanted = {"Range": f"bytes={span.start}-{span.end - 1}", "Accept-Encoding": "identity"}
    headers = wanted | token_headers()
    url = hf_hub_url(repo, span.file, revision=commit)
    session: Any = get_session()
    with session.stream("GET", url, headers=headers, follow_redirects=True) as answer:
        answer.raise_for_status()
        if answer.status_code != 206:
            raise ValueError("parts of files are not to be had")
        for part in answer.iter_bytes():
            left -= len(part)
            if left < 0:
                break
            yield part
    if left:
        raise ValueError(f"{abs(left)} bytes too {'few' if left > 0 else 'many'}")


def token_headers() -> dict[str, str]:
    """The headers that say to a hub who is logged in."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a process, which gets some time to clean up."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def hub_error(error: Exception, subject: str) -> HubError:
    """What an exception of huggingface_hub means for the user who wanted `subject`, a repo or the
    list of models."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, HubError):
        return error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        cause: BaseException = error.__cause__  # the reason why the cache was looked at
    else:
        cause = error
    hub = f"the hub {constants.ENDPOINT}"
    if status := getattr(getattr(cause, "response", None), "status_code", None):
        return _refusal(status, hub, subject)
    if isinstance(cause, OfflineModeIsEnabled):
        reason, said = HubFailure.UNREACHABLE, f"{hub} is not asked while HF_HUB_OFFLINE is set"
    elif isinstance(cause, HFValidationError):
        reason, said = HubFailure.NOT_FOUND, f"'{subject}' names no repo: one is called ORG/NAME"
    elif os.strerror(errno.ENOSPC) in str(cause):  # Xet raises no OSError
        reason, said = HubFailure.NO_SPACE, f"the disk has no room for {subject}"
    elif isinstance(cause, OSError) and cause.errno:
        reason = HubFailure.UNWRITABLE
        said = f"{subject} cannot be written to the model cache: {cause.strerror}"
    elif isinstance(cause, (ValueError, TypeError, KeyError, AttributeError)):
        reason = HubFailure.UNREACHABLE
        said = f"{hub} describes {subject} in a way that makes no sense"
    else:
        reason = HubFailure.UNREACHABLE
        why = re.sub(r"\[Errno -?\d+\] ", "", first_line(error))  # a number tells nobody anything
        said = f"{hub} failed: {why}; pull again to go on"
    return HubError(reason, said)


def _refusal(status: int, hub: str, subject: str) -> HubError:
    """What an HTTP error of a hub means."""
    token = "a token that may read it, from `hf auth login` or in HF_TOKEN"
    said = f"{hub} says {status} to {subject}"
    if status == 403:
        return HubError(
            HubFailure.FORBIDDEN, f"{said}: its owner gives access, and it takes {token}"
        )
    if status in (401, 404):
        return HubError(HubFailure.NOT_FOUND, f"{said}: there is no such repo, or it takes {token}")
    return HubError(HubFailure.UNREACHABLE, f"{said}; pull again later to go on")


class _Reporter:
    """Writes reports to stdout: the one on the file that is under way again and again. Without a
    reader, it ends the process."""

    def __init__(self) -> None:
        self.file, self.completed = 0, 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> _Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self) -> None:
        self.write({"file": self.file, "completed": self.completed})

    def write(self, report: dict[str, Any]) -> None:
        with self._lock:
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()

    def _repeat(self) -> None:
        while not self._ended.wait(_REPORT_SECONDS):
            try:
                self.progress()
            except BrokenPipeError:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _bring(order: Order, reporter: _Reporter) -> None:
    """Downloads the files of an order, one after the other; Xet brings the parts of each at the
    same time. Raises exceptions of huggingface_hub, and HubError."""
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Draws nothing and reports the bytes that are written. With `update_transfer`, the
        library does not use a second bar for the bytes that are received."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})
            reporter.completed = int(self.n)
            reporter.progress()  # what was there before: it tells nothing of the speed

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            reporter.completed = int(self.n)
            if self.n > file.size:  # it might never end, and the library writes all of it
                raise HubError(
                    HubFailure.UNREACHABLE, f"{file.name} is longer than the hub says; pull again"
                )

        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            pass

    for number, file in enumerate(order.files):
        reporter.file, reporter.completed = number, 0
        link = hf_hub_download(
            order.repo,
            file.name,
            revision=order.commit,
            cache_dir=order.cache,
            tqdm_class=Bar,
        )
        _check(file, Path(link))
        reporter.completed = file.size
        reporter.progress()


def _bring_spans(order: Order, reporter: _Reporter) -> None:
    """Writes the file that an order's spans make, under its name when it is whole."""
    target = Path(order.target)
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.incomplete")
    try:
        with part.open("wb") as stream:
            header = order.header.encode()
            stream.write(len(header).to_bytes(8, "little") + header)
            for span in order.spans:
                for data in read_span(order.repo, order.commit, span):
                    stream.write(data)
                    reporter.completed = stream.tell()
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    reporter.progress()


def _check(file: RemoteFile, link: Path) -> None:
    """Removes a file from the cache if its content is wrong, and raises HubError. Blobs that are
    links, to the store that repos share, were checked by Xet as they came; the library checks only
    the size of others."""
    blob = link.parent / os.readlink(link) if link.is_symlink() else link
    if not blob.is_symlink() and not file.matches(blob):
        link.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(HubFailure.UNREACHABLE, f"{file.name} has arrived damaged; pull again")


def main() -> int:
    """Carries out the order on stdin; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes what is not finished
    try:
        order = json.load(sys.stdin)
        files = [RemoteFile(**file) for file in order.pop("files")]
        spans = [Span(**span) for span in order.pop("spans")]
        with _Reporter() as reporter:
            try:
                guard()
                bring = _bring_spans if spans else _bring
                bring(Order(**order, files=files, spans=spans), reporter)
            except Exception as error:
                failure = hub_error(error, order["repo"])
                reporter.write({"error": str(failure), "reason": failure.reason.name})
                return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
