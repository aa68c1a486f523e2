"""Names of one's own for models, with defaults for their requests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _mlx_server.inference.catalog.models import read_json_file
from _mlx_server.inference.catalog.names import plain_name
from _mlx_server.inference.protocol import (
    EngineError,
    InvalidRequest,
    Message,
    Request,
    Sampling,
    fill_sampling,
)

_MAX_FILE = 2**30  # bytes: MAX_PRESETS of MAX_LENGTH, and as much again
_END_OF_TIME = 250_000_000_000  # unix time, in the year 9892; dates end a little later


@dataclass
class Preset:
    """A name of its own for an installed model, and defaults for the requests to it."""

    name: str
    model: str  # the installed model's name
    modified: float = field(default_factory=time.time)  # unix time
    system: str = ""  # for conversations without a system message
    messages: list[Message] = field(default_factory=list)  # which every conversation begins with
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None

    def without_texts(self) -> Preset:
        """The same without what it adds to conversations."""
        return dataclasses.replace(self, system="", messages=[])

    def fill(self, request: Request) -> Request:
        """A request with these defaults where it leaves things open."""
        messages = request.messages
        if messages:
            head = [{"role": "system", "content": self.system}] if self.system else []
            if messages[0]["role"] == "system":
                head, messages = messages[:1], messages[1:]
            # With a context, the conversation has begun already
            messages = [*head, *([] if request.context else self.messages), *messages]
        return dataclasses.replace(
            request,
            messages=messages,
            sampling=fill_sampling(request.sampling, self.sampling),
            stop=request.stop or self.stop,
            max_tokens=self.max_tokens if request.max_tokens is None else request.max_tokens,
        )


class PresetStore:
    """Presets by name, whatever its case, kept in the file `path` if there is one. Any thread may
    use it. Raises EngineError for a file that cannot be read."""

    MAX_PRESETS = 500
    MAX_LENGTH = 1_000_000  # characters of a preset in JSON

    def __init__(self, path: Path | None):
        self._path = path
        # Never changed, but replaced as a whole: readers need no lock
        self._presets = _read(path) if path else {}
        self._writing = threading.Lock()

    def __iter__(self) -> Iterator[Preset]:
        return iter(self._presets.values())

    def get(self, name: str) -> Preset | None:
        """The preset of that name."""
        return self._presets.get(plain_name(name))

    def put(self, preset: Preset) -> None:
        """Adds one or replaces that of its name. Raises EngineError if the file cannot be written,
        InvalidRequest if it is too long or there are too many."""
        if len(json.dumps(dataclasses.asdict(preset))) > self.MAX_LENGTH:
            raise InvalidRequest(f"a preset has at most {self.MAX_LENGTH} characters")
        with self._writing:
            presets = {**self._presets, plain_name(preset.name): preset}
            if len(presets) > max(self.MAX_PRESETS, len(self._presets)):
                raise InvalidRequest(
                    f"there are {self.MAX_PRESETS} presets already; delete one before"
                )
            self._presets = presets
            self._save()

    def remove(self, name: str) -> bool:
        """Removes the preset of that name; returns whether there was one. Raises EngineError if the
        file cannot be written."""
        plain = plain_name(name)
        with self._writing:
            if plain not in self._presets:
                return False
            self._presets = {key: one for key, one in self._presets.items() if key != plain}
            self._save()
        return True

    def _save(self) -> None:
        if not self._path:
            return
        presets = [dataclasses.asdict(preset) for preset in self]
        new = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(new, flags, 0o600), "w", encoding="utf-8") as file:
                json.dump(presets, file, ensure_ascii=False, indent=1)
            os.replace(new, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise EngineError(
                f"{self._path.name} cannot be written: {error.strerror}; "
                "the change lasts until the end"
            ) from None


def _read(path: Path) -> dict[str, Preset]:
    """The presets in a file, if there is one. Raises EngineError."""
    try:
        if not path.exists():
            return {}
        known = map(_preset, read_json_file(path, most=_MAX_FILE))
        return {plain_name(preset.name): preset for preset in known}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(f"{path} cannot be understood; repair or remove it") from error


def _preset(fields: dict[str, Any]) -> Preset:
    """Raises ValueError, TypeError or KeyError for what is none: it would fail every list."""
    preset = Preset(**{**fields, "sampling": Sampling(**fields["sampling"])})
    texts = [preset.name, preset.model, preset.system, *preset.stop]
    texts += [text for one in preset.messages for text in (one["role"], one["content"])]
    numbers = [value for key, value in vars(preset.sampling).items() if key != "logit_bias"]
    numbers += [preset.max_tokens, *(preset.sampling.logit_bias or {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is none")
    if not all(one is None or isinstance(one, (int, float)) for one in numbers):
        raise ValueError("a number is none")
    if not 0 <= preset.modified < _END_OF_TIME:
        raise ValueError("the time is none")
    return preset
