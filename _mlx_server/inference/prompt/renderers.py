"""The renderers of all models that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from _mlx_server.inference.catalog.models import LocalModel

if TYPE_CHECKING:
    from _mlx_server.inference.prompt.renderer import PromptRenderer


class RendererTable:
    """One renderer a model, built by `build` on the thread of the first caller that needs it, while
    others that need the same one wait. From any thread: what decides who builds is one
    `setdefault`, which Python does not interrupt."""

    def __init__(self, build: Callable[[LocalModel], PromptRenderer]):
        self._build = build
        self._futures: dict[str, Future[PromptRenderer]] = {}  # by the model's name

    def get(self, local: LocalModel) -> PromptRenderer:
        """A model's renderer. Raises ModelLoadError; the next call tries again."""
        own: Future[PromptRenderer] = Future()
        future = self._futures.setdefault(local.name, own)
        if future is own:
            try:
                future.set_result(self._build(local))
            except BaseException as error:
                self.forget(local)
                future.set_exception(error)
        return future.result()

    def forget(self, local: LocalModel) -> None:
        """Drops a model's renderer."""
        self._futures.pop(local.name, None)
