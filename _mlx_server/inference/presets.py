"""Names of one's own for models, with defaults for their requests."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from _mlx_server.inference.models import read_json_file
from _mlx_server.inference.names import plain_name
from _mlx_server.inference.protocol import EngineError, Message, Request, Sampling, fill_sampling


@dataclass
class Preset:
    """A name of its own for the model that is called `model`, and what its requests begin with and
    take where they leave things open: a system message, turns of a conversation, sampling, stops
    and the answer's length. `modified` is in unix seconds."""

    name: str
    model: str
    modified: float = field(default_factory=time.time)
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = None

    def fill(self, request: Request) -> Request:
        """A request with these defaults."""
        messages = request.messages
        if messages:
            own = messages[0]["role"] == "system"
            head = (
                messages[:1]
                if own
                else [{"role": "system", "content": self.system}]
                if self.system
                else []
            )
            messages = [*head, *([] if request.context else self.messages), *messages[own:]]
        return dataclasses.replace(
            request,
            messages=messages,
            sampling=fill_sampling(request.sampling, self.sampling),
            stop=request.stop or self.stop,
            max_tokens=self.max_tokens if request.max_tokens is None else request.max_tokens,
        )


class PresetStore:
    """Presets by name, whatever its case, kept in the file `path` if there is one. Raises
    EngineError for one that cannot be read."""

    def __init__(self, path: Path | None):
        self._path = path
        self._presets: dict[str, Preset] = {}
        try:
            known = read_json_file(path) if path and path.exists() else []
            for one in [
                Preset(**{**preset, "sampling": Sampling(**preset["sampling"])}) for preset in known
            ]:
                self._presets[plain_name(one.name)] = one
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{path} cannot be understood; repair or remove it") from error

    def __iter__(self) -> Iterator[Preset]:
        return iter(list(self._presets.values()))

    def get(self, name: str) -> Preset | None:
        return self._presets.get(plain_name(name))

    def put(self, preset: Preset) -> None:
        """Adds one or replaces that of its name. Raises EngineError if the file cannot be
        written."""
        self._presets[plain_name(preset.name)] = preset
        self._save()

    def remove(self, name: str) -> bool:
        """Whether there was one."""
        found = self._presets.pop(plain_name(name), None) is not None
        if found:
            self._save()
        return found

    def _save(self) -> None:
        written = None
        # Another thread may have changed something meanwhile
        while self._path and written != (current := list(self)):
            written = current
            new = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                new.write_text(
                    json.dumps(
                        [dataclasses.asdict(one) for one in written], ensure_ascii=False, indent=1
                    ),
                    "utf-8",
                )
                os.replace(new, self._path)
            except OSError as error:
                new.unlink(missing_ok=True)
                raise EngineError(
                    f"{self._path.name} cannot be written: {error.strerror}; the change lasts until the end"
                ) from None
