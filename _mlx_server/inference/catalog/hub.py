"""The models of a Hugging Face hub: which repo a name means, and how it gets into the cache."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import fnmatch
import functools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.catalog.download import (
    HubError,
    HubFailure,
    Order,
    RemoteFile,
    download,
    hub_error,
    token_headers,
)
from _mlx_server.inference.catalog.hub_client import bounded, guard
from _mlx_server.inference.catalog.models import (
    LocalModel,
    describe,
    shortcoming,
    unsupported,
)
from _mlx_server.inference.catalog.mtp_files import can_have_head, find_head
from _mlx_server.inference.catalog.mtp_pull import INDEX, SINGLE, head_order, sidecars
from _mlx_server.inference.catalog.names import best_repo, parse_name
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.protocol import EngineError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

log = logging.getLogger("mlx_server")

_REACH_SECONDS = 10.0  # for a hub to say anything at all
_MAX_NAME = 200  # bytes of a file's name in a repo


class PullStage(enum.Enum):
    """What a pull has come to."""

    LISTED = "the repo's files are known"
    FILE = "some bytes of a file are there"
    CHECKED = "all files are there, and their content is right"
    LINKED = "the cache's main revision is this one"
    HEAD = "the model's MTP head is wanted as well"
    DONE = "the model can be used"


@dataclass(frozen=True)
class PullProgress:
    """One step of a pull. At FILE, `completed` bytes of `file` are there; at HEAD, `said` tells
    where a head comes from or why there is none, and `more` how many bytes come for it."""

    stage: PullStage
    file: RemoteFile | None = None
    completed: int = 0
    said: str = ""
    more: int = 0


class Hub:
    """The models of the hub that huggingface_hub asks ($HF_ENDPOINT, with the token of
    `hf auth login` or $HF_TOKEN), and the cache folder they are downloaded to.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""

    # What a model is loaded from
    FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")

    def __init__(self, cache: Path):
        self._cache = cache

    def pull(self, name: str) -> Generator[PullProgress]:
        """Downloads the model that a name means, or what is missing of it. Closing the iterator
        stops that. Raises HubError. A model that was trained with an MTP head and has lost it when
        it was converted gets one, if the hub has it; whatever keeps it from that fails nothing.

        The cache's `main` revision changes when all is there. Before that, the new revision has no
        config.json, or not all of its weights, and so is no model yet. Files that have arrived
        whole are kept if the rest fails."""
        repo = self.find(name)
        commit, files, base = self._list(repo)
        yield PullProgress(PullStage.LISTED)
        folder = self._cache / f"models--{repo.replace('/', '--')}"
        with _alone(self._cache / ".locks" / folder.name / "pull.lock", repo):
            snapshot = folder / "snapshots" / commit
            missing = [file for file in files if not (snapshot / file.name).exists()]
            for file in files:
                if file not in missing:
                    yield PullProgress(PullStage.FILE, file, file.size)
            if missing:
                self._check_space(repo, folder, missing)
                order = Order(repo, commit, str(self._cache), missing)
                with contextlib.closing(download(order)) as reports:
                    for file, completed in reports:
                        yield PullProgress(PullStage.FILE, file, completed)
            yield PullProgress(PullStage.CHECKED)
            _point_main(folder, commit, repo)
            yield from self._pull_head(repo, snapshot, base)
        yield PullProgress(PullStage.LINKED)
        log.info("pulled %s", repo)
        yield PullProgress(PullStage.DONE)

    def size(self, repo: str) -> int:
        """Bytes of a repo's model. Raises HubError."""
        return sum({file.digest: file.size for file in self._list(repo)[1]}.values())

    def choose(self, name: str, memory: int) -> tuple[str, int, str]:
        """The repo that a name means to a machine whose GPU may use so many bytes, its size in
        bytes, and why. Where the name says no quantisation that is the 8-bit one, if half of the
        memory can hold it. Raises HubError."""
        repo = self.find(name)
        size, most = self.size(repo), f"the {gigabytes(memory)} of memory that can be used"
        if "/" in name or parse_name(name).bits:
            return repo, size, "as asked"
        if size > memory:
            raise HubError(
                HubFailure.NO_SPACE,
                f"{repo} takes {gigabytes(size)}, more than {most}; "
                f"pull a smaller model, or just '{repo}'",
            )
        try:
            better = self.find(re.sub(r"(?i)[4-6](-?bit)", r"8\1", repo.partition("/")[2]))
        except HubError as error:
            if error.reason is not HubFailure.NOT_FOUND:
                raise
            better = repo
        if better == repo:
            return repo, size, "there is no 8-bit version"
        if (larger := self.size(better)) <= memory // 2:
            return better, larger, f"8-bit fits into half of {most}"
        return repo, size, f"8-bit takes {gigabytes(larger)}, more than half of {most}"

    def find(self, name: str) -> str:
        """The repo that a name means: itself, or the best of mlx-community's. Raises HubError if
        there is none."""
        plain = re.sub(r"^(hf\.co|huggingface\.co)/", "", name).removesuffix(":latest")
        if "/" in plain:
            return plain
        family = re.match(r"[a-z]*", plain, re.I)
        for words in dict.fromkeys((plain.partition(":")[0], family[0] if family else "")):
            if repo := best_repo(plain, self._search(words)):
                return repo
        raise HubError(
            HubFailure.NOT_FOUND,
            f"mlx-community has no model '{name}'; any repo can be pulled as ORG/NAME",
        )

    @functools.cached_property
    def api(self) -> HfApi:
        """What asks the hub, which can be reached. Raises HubError."""
        from huggingface_hub import HfApi, get_session  # takes most of a second

        # It warns at each of its attempts; what fails in the end is raised
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        guard()
        api = HfApi()
        try:  # Its own requests wait without end for an answer, or try six times to connect
            get_session().head(
                api.endpoint,
                headers=token_headers(),
                timeout=_REACH_SECONDS,
                follow_redirects=False,
            )
        except Exception as error:
            raise hub_error(error, "the hub") from error
        return api

    def listing(self, most: int) -> list[ModelInfo]:
        """The `most` models of mlx-community that were downloaded most in the last 30 days, with
        what their configs and weights are. Raises HubError."""
        try:
            with bounded():
                found = self.api.list_models(
                    author="mlx-community",
                    sort="downloads",
                    limit=most,
                    expand=["config", "createdAt", "downloads", "pipeline_tag", "safetensors"],
                )
                return list(found)
        except Exception as error:
            raise hub_error(error, "the list of models") from error

    def read_json(self, repo: str, name: str) -> Any:
        """A JSON file of a repo, which does not get into the cache. Raises HubError."""
        from huggingface_hub import get_session, hf_hub_url

        try:
            url = hf_hub_url(repo, name, endpoint=self.api.endpoint)
            with bounded():
                answer = get_session().get(url, headers=token_headers(), follow_redirects=True)
                answer.raise_for_status()
                return answer.json()
        except Exception as error:
            raise hub_error(error, repo) from error

    def _search(self, words: str) -> list[str]:
        """The ids of mlx-community's repos that have these words in their names."""
        try:
            with bounded():
                found = self.api.list_models(
                    author="mlx-community", search=words, sort="downloads", limit=1000
                )
                return [model.id for model in found if isinstance(model.id, str)]
        except Exception as error:
            raise hub_error(error, "the list of models") from error

    def _list(self, repo: str) -> tuple[str, list[RemoteFile], str]:
        """A repo's last commit, those of its files that are wanted, in the order in which they are
        to be downloaded, and the repo of the model that it was made from, as far as it says so.
        Raises HubError."""
        info, files = self._listed(repo, self.FILES)
        try:
            why = unsupported(info.config or {})
            names = [file.rfilename for file in info.siblings or []]
            bases = getattr(info.card_data, "base_model", None)
            base = bases[0] if isinstance(bases, list) and bases else bases
        except Exception as error:
            raise hub_error(error, repo) from error
        if not any(file.name.endswith(".safetensors") for file in files):
            raise HubError(HubFailure.NO_MODEL, f"{repo} holds no MLX model: {shortcoming(names)}")
        if why:
            raise HubError(HubFailure.NO_MODEL, f"{repo} cannot be used: {why}")
        # A folder counts as a model once it has config.json and all weights that its index names
        files.sort(key=lambda file: (file.name == "config.json", file.name.endswith("safetensors")))
        return str(info.sha), files, base if isinstance(base, str) else ""

    def _listed(self, repo: str, patterns: tuple[str, ...]) -> tuple[ModelInfo, list[RemoteFile]]:
        """What the hub says of a repo, and those of its files whose names fit. Raises HubError."""
        try:
            with bounded():
                info = self.api.model_info(repo, revision="main", files_metadata=True)
            files = [
                _remote_file(file)
                for file in info.siblings or []
                if any(fnmatch.fnmatchcase(file.rfilename, pattern) for pattern in patterns)
            ]
            if not info.sha or not re.fullmatch(r"[\da-f]{40}", info.sha):
                raise ValueError(f"{info.sha} is no commit")
        except Exception as error:
            raise hub_error(error, repo) from error
        return info, files

    def _pull_head(self, repo: str, snapshot: Path, base: str) -> Generator[PullProgress]:
        """Brings the MTP head of a model that has come without it."""
        try:
            local = describe(repo, snapshot)
            if not can_have_head(local) or find_head(local):
                return
            order = self._find_head(local, base)
            size = sum(file.size for file in order.files)
            said = f"with the MTP head of {order.repo}, {gigabytes(size)}: several tokens a pass"
            log.info("%s comes %s", repo, said)
            yield PullProgress(PullStage.HEAD, said=said, more=size)
            folder = self._cache / f"models--{order.repo.replace('/', '--')}"
            self._check_space(order.repo, snapshot if order.spans else folder, order.files)
            with contextlib.closing(download(order)) as reports:
                for file, completed in reports:
                    yield PullProgress(PullStage.FILE, file, completed)
            if not order.spans:
                _point_main(folder, order.commit, order.repo)
        except Exception as error:
            why = error if isinstance(error, EngineError) else hub_error(error, "an MTP head")
            log.info("%s comes without an MTP head: %s", repo, why)
            yield PullProgress(PullStage.HEAD, said=f"without an MTP head: {why}")

    def _find_head(self, local: LocalModel, base: str) -> Order:
        """How the MTP head of a model can be had: from a sidecar, or from the checkpoint of the
        model `base`. It is one layer, so what is as large as the model is none. Raises HubError,
        and exceptions of huggingface_hub."""
        for repo in sidecars(local.name, self._search("mtp")):
            info, files = self._listed(repo, ("config.json", "*.safetensors"))
            if sum(file.size for file in files) <= local.size // 2:
                return Order(repo, str(info.sha), str(self._cache), files)
        if not base:
            raise HubError(HubFailure.NOT_FOUND, "it does not say which model it was made from")
        info, files = self._listed(base, (INDEX, SINGLE))
        names = [file.name for file in files]
        index = self.read_json(base, INDEX) if INDEX in names else None
        order = None
        if names:
            order = head_order(base, str(info.sha), index, self._cache, local.path)
        if order is None:
            raise HubError(HubFailure.NOT_FOUND, f"{base} has none")
        if order.files[0].size > local.size // 2:
            raise HubError(HubFailure.NO_MODEL, f"that of {base} is too large to be one")
        return order

    def _check_space(self, repo: str, folder: Path, files: list[RemoteFile]) -> None:
        """Raises HubError if the disk has no room for files, those apart whose content another
        revision has already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise hub_error(error, repo) from None
        needed = {f.digest: f.size for f in files if not (folder / "blobs" / f.digest).exists()}
        if sum(needed.values()) > free:
            raise HubError(
                HubFailure.NO_SPACE,
                f"{repo} needs {sum(needed.values())} bytes, and {free} are free on the disk",
            )


def _remote_file(file: RepoSibling) -> RemoteFile:
    """A wanted file. Raises ValueError for one without size or digest, or with a name that leads
    out of its repo's folder or fits into no path."""
    digest = file.lfs.sha256 if file.lfs else file.blob_id
    if (
        not (type(file.size) is int and 0 <= file.size < 2**60)
        or len(file.rfilename.encode()) > _MAX_NAME
        or not file.rfilename.isprintable()
        or not re.fullmatch(r"[\da-f]{40}([\da-f]{24})?", digest or "")
        or {"..", "/"} & set(PurePosixPath(file.rfilename).parts)
    ):
        raise ValueError(f"{file} is no file of a repo")
    return RemoteFile(file.rfilename, file.size, str(digest))


@contextlib.contextmanager
def _alone(path: Path, repo: str) -> Iterator[None]:
    """Holds a lock file while a repo is pulled. Raises HubError if another pull holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise hub_error(error, repo) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(HubFailure.BUSY, f"{repo} is being downloaded already") from None
        yield


def _point_main(folder: Path, commit: str, repo: str) -> None:
    """Makes a commit the one that `main` means in the cache."""
    try:
        (folder / "refs").mkdir(exist_ok=True)
        new = folder / f"main.{secrets.token_hex(4)}"
        new.write_text(commit)
        os.replace(new, folder / "refs" / "main")
    except OSError as error:
        raise hub_error(error, repo) from None
