"""Routes that show, make, fetch and remove models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from _mlx_server.front.answers import send_progress
from _mlx_server.front.http import HTTPHandler
from _mlx_server.front.logs import shortened
from _mlx_server.inference.catalog.models import Loaded, LocalModel, read_shown_files
from _mlx_server.inference.catalog.names import VENDOR_NAME, plain_name
from _mlx_server.inference.catalog.presets import Preset
from _mlx_server.inference.protocol import ModelNotFound
from _mlx_server.wire.fields import Object, WireError, field, short_name
from _mlx_server.wire.ollama_models import checked_name, ollama_create, ollama_ps, ollama_show

# Organisations whose models clients ask for, though they are never installed
VENDORS = ("anthropic", "openai")


class Models(Protocol):
    """What these routes need of `engine.Engine`, which says what each does."""

    @property
    def hub(self) -> Path: ...
    def resolve(self, name: str, owner: str = ...) -> LocalModel: ...
    def context_length(self, local: LocalModel) -> int: ...
    def loaded(self) -> list[Loaded]: ...
    def preset(self, name: str) -> Preset | None: ...
    def keep(self, preset: Preset) -> None: ...
    def delete(self, name: str) -> None: ...


class ModelRoutes(HTTPHandler):
    """A connection's routes about models. A subclass has the `engine` and says which route is
    whose."""

    @property
    def engine(self) -> Models:
        """Raises EngineClosed if there is none."""
        raise NotImplementedError

    def is_upstreams(self, name: str) -> bool:
        """Whether an upstream has a model of that name."""
        raise NotImplementedError

    def resolve(self, name: str) -> LocalModel:
        """The model that a name means to whoever asks. Raises ModelNotFound."""
        return self.engine.resolve(name, self.exchange.owner)

    def read_object(self) -> Object:
        """The body as JSON; the model that it names is noted. Raises WireError."""
        return self.with_model(self.read_json())

    def with_model(self, body: Object) -> Object:
        """A body, of which the model that it names is noted."""
        name = body.get("model") or body.get("name")
        self.exchange.model = short_name(name) if isinstance(name, str) else None
        return body

    def require_manager(self, to: str = "create, copy, pull, delete or unload models") -> None:
        """Raises WireError if the request's key is one for low priority: whoever holds it may use
        the models, but neither change which there are nor see or end what others do."""
        if self.exchange.low_priority:
            raise WireError(403, f"this API key may not {to}")

    def read_model_name(self) -> str:
        """The model that the body names. Raises WireError if it names none."""
        self.read_object()
        if self.exchange.model is None:
            raise WireError(400, "model is required")
        return self.exchange.model

    def post_show(self) -> None:
        name = self.read_model_name()
        self.send_found(lambda: self.show(name))

    def show(self, name: str) -> Object:
        """What is told of the model that a name means. Raises ModelNotFound."""
        engine, local = self.engine, self.resolve(name)
        template, generation = read_shown_files(local)
        context, preset = engine.context_length(local), engine.preset(name)
        if preset is not None and self.exchange.low_priority:
            preset = preset.without_texts()
        return ollama_show(local, context, template, generation, name, preset)

    def delete_model(self) -> None:
        self.require_manager()
        name = self.read_model_name()
        self.engine.delete(name)
        self.send(200, b"")

    def post_copy(self) -> None:
        self.require_manager()
        body = self.read_object()
        source, name = (
            checked_name(body.get(key), f"{key} {shortened(json.dumps(body.get(key)))} is invalid")
            for key in ("source", "destination")
        )
        self.require_free(name)
        preset = dataclasses.replace(self.base(source), name=name, modified=time.time())
        self.engine.keep(preset)
        self.send(200, b"")

    def post_create(self) -> None:
        self.require_manager()
        body = self.read_object()
        name = checked_name(self.exchange.model, "invalid model name")
        source = field(body, "from", str, default="")
        if not source and not body.get("files"):
            raise WireError(400, "neither 'from' or 'files' was specified")
        self.require_free(name)
        preset = ollama_create(body, name, self.base(source) if source else Preset(name, ""))

        def create() -> Generator[Object, None, None]:
            self.engine.keep(preset)
            yield {"status": "writing manifest"}
            yield {"status": "success"}

        send_progress(self, create(), field(body, "stream", bool, default=True))

    def require_free(self, name: str) -> None:
        """Raises WireError for a name that a preset must not take: others mean something else by
        it."""
        plain = plain_name(name)
        org, _, last = plain.rpartition("/")
        if org in VENDORS or VENDOR_NAME.fullmatch(last):
            raise WireError(400, f"'{name}' is a name that clients ask for; take another")
        if self.engine.preset(name) is not None:
            return
        if self.is_upstreams(name):
            raise WireError(400, f"'{name}' is the name of a model of the upstream; take another")
        with contextlib.suppress(ModelNotFound):
            model = self.resolve(name)
            raise WireError(400, f"'{name}' is the name of an installed model, {model.name}")

    def base(self, source: str) -> Preset:
        """The preset that a name means, or an empty one of its model."""
        local = self.resolve(short_name(source))
        return self.engine.preset(source) or Preset(local.name, local.name)

    def post_pull(self) -> None:
        # All about downloads, which a server may never be asked for
        from _mlx_server.inference.catalog.hub import Hub
        from _mlx_server.wire.pull import ollama_pull

        self.require_manager()
        body = self.read_object()
        name = (self.exchange.model or "").removeprefix("https://")
        steps = Hub(self.engine.hub).pull(checked_name(name, "invalid model name"))
        send_progress(self, ollama_pull(steps), field(body, "stream", bool, default=True))

    def post_push(self) -> None:
        self.read_object()
        named = bool(self.exchange.model)
        raise WireError(400, "models cannot be pushed from here" if named else "model is required")

    def get_blob(self) -> None:
        raise WireError(404, "this server keeps no blobs")

    def post_blob(self) -> None:
        raise WireError(
            400, "this server keeps no blobs: a model can be created 'from' an installed one"
        )

    def get_ps(self) -> None:
        low = self.exchange.low_priority

        def find() -> Object:
            loaded = self.engine.loaded()
            if low:  # without what is kept for others, and the time of their latest request
                loaded = [
                    dataclasses.replace(one, size=one.model.size, expires=None) for one in loaded
                ]
            return ollama_ps(loaded)

        self.send_found(find)
