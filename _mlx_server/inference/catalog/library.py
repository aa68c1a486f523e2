"""The models on this machine and the one resolver of their names."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _mlx_server.inference.catalog.models import (
    LocalModel,
    UnsupportedModel,
    describe,
    read_file,
)
from _mlx_server.inference.catalog.names import (
    VENDOR_NAME,
    VENDOR_PREFIX,
    all_matches,
    best_match,
    plain_name,
    short_names,
    stand_in,
)
from _mlx_server.inference.catalog.presets import Preset, PresetStore
from _mlx_server.inference.protocol import (
    EngineError,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
)

log = logging.getLogger("mlx_server")


def _demos() -> list[Path]:
    """Where the built-in model may be: in a checkout, or in an installation."""
    return [
        Path(__file__).parents[3] / "tests" / "demo",
        Path(sys.prefix) / "share" / "mlx-server" / "demo",
    ]


@dataclass(frozen=True)
class Look:
    """The models that were found at a time in monotonic seconds, what the folders were like then,
    and which of the models the names are that have been looked for."""

    models: list[LocalModel]
    time: float = -math.inf
    folders: list[int] | None = None
    matches: dict[tuple[str, str | None], LocalModel | None] = field(default_factory=dict)

    @functools.cached_property
    def stand_in(self) -> LocalModel | None:
        """The model for a name that is no model's."""
        return stand_in(self.models)


MAX_NAME = 512  # characters of a model's name
_MAX_REVISION = 256  # bytes of a file that names one
_REVISION = re.compile(r"\w[\w.-]*", re.ASCII)  # a folder's name that leads nowhere else


class Library:
    """The models on this machine and the one resolver of their names. Any thread may use it.

    It looks into `models_dirs` (each a model, or a folder of NAME or ORG/NAME), the Hugging Face
    cache, LM Studio's folders, and for the built-in `demo`; where two have one name, the first
    counts. `aliases` are pairs of (glob, name), `state` is the file of the presets."""

    TRUST = 1.0  # seconds for which a name may be looked for among the models found last
    SETTLED = 0.1  # seconds within which two changes of a folder may have the same time

    def __init__(
        self,
        models_dirs: Sequence[str | Path] = (),
        aliases: Sequence[tuple[str, str]] = (),
        state: Path | None = None,
    ):
        self.presets = PresetStore(state)
        self.only: LocalModel | None = None  # the one that can be served, if there are no others
        self._dirs = [expanded(folder) for folder in models_dirs]
        self._aliases = [(pattern.lower(), target) for pattern, target in aliases]
        # Trusted paths outside those folders, which are listed from then on. Threads only append.
        self._explicit: list[Path] = []
        # When folders and their config.json were changed, and what was found then. Threads only
        # replace whole entries, and may at worst read a folder twice.
        self._described: dict[Path, tuple[tuple[int, int], LocalModel | None]] = {}
        # Models that mlx-lm does not know, by their folders, with what is said of them
        self._unsupported: dict[Path, UnsupportedModel] = {}
        self._look = Look([])  # threads only replace it, and add matches

    def models(self) -> list[LocalModel]:
        """Every loadable model. Folders that have not changed are not read again."""
        if self.only is not None:
            return [self.only]
        found: dict[str, LocalModel] = {}
        for name, path in self._folders():
            if name.lower() not in found and (model := self._describe(name, path)):
                found[name.lower()] = model
        return list(found.values())

    def _recent_look(self) -> Look:
        """What was found last, if that was a moment ago and no folder that holds models has changed
        since, so that not every request looks into each of a thousand folders."""
        folders, now = self._folder_times(), time.monotonic()
        look = self._look
        if now - look.time >= self.TRUST or look.folders is None or look.folders != folders:
            settled = max(folders) < (time.time() - self.SETTLED) * 1e9
            look = Look(self.models(), now, folders if settled else None)
            self._look = look
        return look

    def _folder_times(self) -> list[int]:
        """When the folders that hold models were changed last, in nanoseconds of unix time."""
        times = []
        for root in self._roots():
            try:
                times.append(os.stat(root).st_mtime_ns)
            except OSError:
                times.append(0)
        return [*times, len(self._explicit)]

    def catalog(self) -> list[LocalModel]:
        """Every model that can be served, presets as models of their names."""
        models = self.models()
        by_name = {model.name: model for model in models}
        return models + [
            dataclasses.replace(by_name[preset.model], name=preset.name, modified=preset.modified)
            for preset in self.presets
            if preset.model in by_name
        ]

    def resolve(
        self,
        name: str,
        *,
        default: LocalModel | None = None,
        last_used: LocalModel | None = None,
        trusted: bool = False,
    ) -> LocalModel:
        """The model that `name` means, by the first of these that fits:

        1. a path: of any folder if `trusted` (the command line, scripts), else only of a model that
           is listed already;
        2. an alias, whose target is then resolved as a trusted name, or a preset;
        3. a repo id or folder name, in any case, without its org if need be; `:latest` never
           counts;
        4. family, size and variant, as in `qwen2.5-coder:32b-instruct-q8_0`. Family, version,
           variant (VL, Coder, Base, Thinking, ...) and size have to agree. Of several that do, the
           best is: the last used if no size is asked for; an instruct model; 4-bit, then 5, 6, 8,
           3, unquantised; the smaller; the later revision; the plainer name;
        5. a vendor's name (`claude-*`, `gpt-*`, `opus`, ...) or "default": `default`, else
           `last_used`, else the newest one that can chat, rather one that knows tools, else `demo`.

        A name that begins with VENDOR_PREFIX and means nothing is read without it.

        Raises ModelNotFound; ModelLoadError for a trusted path or name of something that is no MLX
        model."""
        if len(name) > MAX_NAME:
            raise ModelNotFound(f"{name[:40]}…", [model.name for model in self.models()])
        target, by_owner = self._target(self._unprefixed(name), trusted)

        def among(look: Look) -> LocalModel | None:
            if _is_path(target, by_owner):
                return self._at_path(name, target, look.models, by_owner, trusted)
            plain = plain_name(target)
            key = plain, last_used.name if last_used else None
            if key not in look.matches:
                look.matches[key] = best_match(plain, look.models, last_used)
            model = look.matches[key]
            if model is None and VENDOR_NAME.fullmatch(plain):
                # The demo counts only where there is nothing else
                used = last_used if last_used and last_used.name != "demo" else None
                model = default or used or look.stand_in
            return model

        look = self._recent_look() if self.only is None else Look(self.models())
        model = among(look)
        if self.only is None and (model is None or not self._is_current(model)):
            look = Look(self.models())
            model = among(look)
        if model is None and by_owner:
            self._explain(target, trusted)
        if model is None:
            self._explain_unsupported(target)
        if model is None:
            raise ModelNotFound(name, [model.name for model in look.models])
        return model

    def matches(self, name: str) -> list[LocalModel]:
        """Every model that `name` may mean: those of exactly this name, else of this name in any
        org, else those that answer to it."""
        return all_matches(plain_name(name), self.models())

    def short_name(self, model: LocalModel) -> str:
        """The shortest name that this model answers to, by the rules of `resolve`."""
        for name in short_names(model):
            with contextlib.suppress(ModelNotFound):
                if self.resolve(name).name == model.name:
                    return name
        return model.name

    def shortcomings(self) -> list[tuple[str, str]]:
        """The folders that are no models, by name, and why not."""
        found: dict[str, str] = {}
        for name, path in self._folders():
            try:
                describe(name, path)
            except ModelLoadError as error:
                found.setdefault(name, str(error).removeprefix(f"{path} "))
        good = {model.name for model in self.models()}
        return [(name, why) for name, why in found.items() if name not in good]

    def _is_current(self, model: LocalModel) -> bool:
        """Whether a model is still there as it was found, and in a hub cache still the revision
        that is listed first."""
        folder = model.path
        if (
            folder.parent.name == "snapshots"
            and next(snapshots(folder.parents[1]), folder) != folder
        ):
            return False
        return self._describe(model.name, model.path) == model

    def _at_path(
        self, name: str, path: str, models: list[LocalModel], by_owner: bool, trusted: bool
    ) -> LocalModel | None:
        """The model at a path that `name` stands for."""
        try:
            return self._by_path(path, models, by_owner)
        # The latter two for what cannot be a path
        except (ModelLoadError, ValueError, RuntimeError) as error:
            if trusted:
                raise
            log.warning("%s cannot be served: %s", name, error)
            return None

    def _target(self, name: str, trusted: bool) -> tuple[str, bool]:
        """The name or path that an alias or a preset stands for, else `name` itself; and whether
        the owner of the machine has written it."""
        if _is_path(name, trusted):
            return name, trusted
        target = self._aliased(name)
        by_owner = trusted or target is not name
        preset = self.presets.get(target)
        return (preset.model if preset else target), by_owner

    def _aliased(self, name: str) -> str:
        plain = plain_name(name)
        for pattern, target in self._aliases:
            if fnmatch.fnmatchcase(plain, pattern):
                return target
        return name

    def preset(self, name: str) -> Preset | None:
        """The preset that `name` means."""
        return self.presets.get(self._aliased(self._unprefixed(name)))

    def _unprefixed(self, name: str) -> str:
        """`name` without VENDOR_PREFIX, unless an alias, a preset or a model has it too."""
        if not name.lower().startswith(VENDOR_PREFIX):
            return name
        is_known = (
            self._aliased(name) is not name
            or self.presets.get(name) is not None
            or best_match(plain_name(name), self.models(), None) is not None
        )
        return name if is_known else name[len(VENDOR_PREFIX) :]

    def delete(
        self,
        name: str,
        model: LocalModel,
        release: Callable[[LocalModel], None] = lambda model: None,
    ) -> None:
        """Deletes a model's files, once `release` has returned. Raises as `deletable` does, and
        EngineError."""
        folder = self.deletable(name, model)
        release(model)
        try:
            if folder.name.startswith("models--"):
                _delete_repo(folder)
            else:
                shutil.rmtree(folder)
        except OSError as error:
            log.error("%s cannot be deleted: %s", error.filename, error.strerror)
            raise EngineError(f"model '{model.name}' cannot be deleted: {error.strerror}") from None
        log.info("deleted %s", folder)

    def deletable(self, name: str, model: LocalModel) -> Path:
        """What holds a model's files and nothing else. Raises InvalidRequest if `name` is not its
        whole one or it is not ours to delete."""
        if plain_name(name) != model.name.lower():
            raise InvalidRequest(f"to delete a model, say its whole name: '{model.name}'")
        folder = self._folder(model)
        if folder is None:
            raise InvalidRequest(f"model '{model.name}' is not this server's to delete")
        return folder

    def _folder(self, model: LocalModel) -> Path | None:
        """What holds a model's files and nothing else, if it is ours to delete: it lies in
        `models_dirs` or the Hugging Face cache, not only by a link, and is not the demo."""
        path = Path(os.path.realpath(model.path))
        if path in map(Path, map(os.path.realpath, _demos())):
            return None
        for root in map(Path, map(os.path.realpath, [*self._dirs, self.hub])):
            if path != root and path.is_relative_to(root):
                repo = root / path.relative_to(root).parts[0]
                return repo if repo.name.startswith("models--") else path
        return None

    @property
    def hub(self) -> Path:
        """The Hugging Face cache."""
        return hub_folder()

    def _by_path(self, name: str, models: list[LocalModel], trusted: bool) -> LocalModel | None:
        path = expanded(name)
        if path.name.startswith("models--"):  # a repo's folder in a Hugging Face cache
            path = next(snapshots(path), path)
        path = Path(os.path.realpath(path))
        known = next((model for model in models if os.path.realpath(model.path) == str(path)), None)
        if known is None and trusted:
            known = describe(path.name, path)
            self._explicit.append(path)
        return known

    def _explain(self, name: str, trusted: bool) -> None:
        """Raises ModelLoadError if there is a folder of this name that cannot be served. Clients,
        who are not `trusted`, are told no path."""
        plain = plain_name(name)
        for folder, path in self._folders():
            if folder.lower() == plain:
                try:
                    describe(name, path)
                except ModelLoadError as error:
                    if trusted:
                        raise
                    log.warning("%s", error)
                    said = str(error).replace(str(path), f"model '{name}'")
                    raise ModelLoadError(said) from error.__cause__

    def unsupported(self) -> list[UnsupportedModel]:
        """What is said of each model that mlx-lm does not know."""
        self.models()
        present = {path for _, path in self._folders()}
        return [error for path, error in list(self._unsupported.items()) if path in present]

    def _explain_unsupported(self, name: str) -> None:
        """Raises UnsupportedModel if that is what a name means."""
        errors = self.unsupported() if self._unsupported else []
        meant = best_match(plain_name(name), [error.model for error in errors], None)
        for error in errors:
            if error.model is meant:
                raise UnsupportedModel(error.model, error.why)

    def _describe(self, name: str, path: Path) -> LocalModel | None:
        """The model in a folder, read anew only if the folder has changed; None if there is
        none."""
        try:
            seen = path.stat().st_mtime_ns, (path / "config.json").stat().st_mtime_ns
        except OSError:
            return None
        known = self._described.get(path)
        if known and known[0] == seen:
            return known[1]
        self._unsupported.pop(path, None)
        model = None
        try:
            model = describe(name, path)
        except UnsupportedModel as error:
            self._unsupported[path] = error
            log.info("model skipped: %s", error)
        except ModelLoadError as error:
            # Folders of other kinds are nobody's mistake; files that cannot be read are.
            level = logging.WARNING if error.__cause__ else logging.DEBUG
            log.log(level, "model skipped: %s", error)
        self._described[path] = seen, model
        return model

    def _roots(self) -> list[Path]:
        """The folders that hold models."""
        home = expanded("~")
        studio = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
        return [*self._dirs, self.hub, *studio]

    def _folders(self) -> Iterator[tuple[str, Path]]:
        """Where models may be, with the names they would have."""
        for path in list(self._explicit):
            yield path.name, path
        for root in self._roots():
            if os.path.exists(root / "config.json"):
                yield root.resolve().name, root
                continue
            for child in subfolders(root):
                if child.name.startswith("models--"):
                    name = child.name.removeprefix("models--").replace("--", "/")
                    yield from ((name, checkpoint) for checkpoint in snapshots(child))
                elif os.path.exists(child / "config.json"):
                    yield child.name, child
                else:
                    yield from ((f"{child.name}/{path.name}", path) for path in subfolders(child))
        yield from (("demo", path) for path in _demos())


def expanded(name: str | Path) -> Path:
    """A path whose `~` is a home, where there is one: a container's user may have none."""
    return Path(os.path.expanduser(name))


def hub_folder() -> Path:
    """The Hugging Face cache, as huggingface_hub finds it, whose import takes too long for the
    start: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return expanded(os.path.expandvars(hub or os.path.join(home, "hub")))


def subfolders(path: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out; none if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return sorted(Path(entry.path) for entry in entries if _is_shown_folder(entry))
    except OSError:
        return []


def _is_shown_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.name[0] != "." and entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look: the others count
        return False


def snapshots(repo: Path) -> Iterator[Path]:
    """A cached repo's revisions: the one `main` points to, then the others, newest first."""
    with contextlib.suppress(OSError, ValueError):
        main = read_file(repo / "refs" / "main", most=_MAX_REVISION).decode().strip()
        if _REVISION.fullmatch(main):
            yield repo / "snapshots" / main
    revisions = subfolders(repo / "snapshots")
    yield from sorted(revisions, key=_time_of_change, reverse=True)


def _time_of_change(path: Path) -> float:
    """In unix time; 0 for what has gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _delete_repo(folder: Path) -> None:
    """Deletes a repo's folder in a Hugging Face cache, and what no other repo needs of the files
    that it shares with others. Raises OSError."""
    from huggingface_hub import DeleteCacheStrategy

    # Made here and not by a scan of the cache, which leaves out repos that are not whole, and
    # which takes commits of the same hash in several repos for one
    strategy = DeleteCacheStrategy(
        expected_freed_size=0,
        repos=frozenset({folder}),
        snapshots=frozenset(),
        refs=frozenset(),
        blobs=frozenset(),
        cache_dir=folder.parent,
    )
    strategy.execute()
    if folder.exists():  # the library only logs that
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _is_path(name: str, trusted: bool) -> bool:
    """Whether a name is to be read as a path; from others than the owner only one that cannot be
    anything else."""
    if name.startswith(("/", "~", "./", "../")):
        return True
    return trusted and (
        name in (".", "..")
        or name.endswith(".gguf")
        or os.path.exists(os.path.join(name, "config.json"))
    )
