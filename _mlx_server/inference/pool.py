"""The models in memory, and who gets how much of it."""

from __future__ import annotations

import gc
import logging
import math

from _mlx_server.inference.disk_cache import DiskCache
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import StateSize, usable_memory
from _mlx_server.inference.models import LocalModel
from _mlx_server.inference.prefix_cache import PrefixCache
from _mlx_server.inference.protocol import PromptTooLong
from _mlx_server.inference.renderer import PromptRenderer
from _mlx_server.inference.runner import ModelRunner

log = logging.getLogger("mlx_server")


class ModelPool:
    """The models in memory, and who gets how much of it. On the MLX thread, but for reading.

    Policy. The weights, the KV that admitted requests are expected to need, and the prefix cache
    stay within `memory` bytes together. A request that needs room gets it from the prefix cache
    first, then from idle models, the least recently used one going first, and otherwise waits until
    others are through. When answers grow beyond what was expected, the latest request of the lowest
    priority is paused. `max_loaded` bounds the number of models."""

    def __init__(
        self,
        memory: int,
        cache_limit: int,
        max_loaded: int | None,
        kv_bits: int | None,
        disk_cache: DiskCache | None,
        group: Group,
    ):
        self.memory, self._group = memory, group
        self.prefixes = PrefixCache(self._spare, group)
        self.runners: dict[str, ModelRunner] = {}
        # By model: bytes of the weights and of a state, once it was loaded
        self.states: dict[str, tuple[int, StateSize]] = {}
        self._cache_limit, self._max_loaded, self._kv_bits, self._disk_cache = (
            cache_limit,
            max_loaded,
            kv_bits,
            disk_cache,
        )

    def jobs(self) -> list[Generation]:
        return [job for runner in list(self.runners.values()) for job in list(runner.jobs)]

    def context(self, name: str) -> int | None:
        """Tokens of a conversation that memory can hold beside the model alone; None if that is not
        known or no bound."""
        weights, state = self.states.get(name, (0, None))
        return state.tokens(self.memory - weights) if state else None

    def _spare(self) -> int:
        return min(self._cache_limit, self.memory - self._committed())

    def _committed(self) -> int:
        return sum(r.size + sum(map(r.reserve, r.jobs)) for r in self.runners.values())

    def open(self, local: LocalModel, renderer: PromptRenderer) -> ModelRunner | None:
        """The model, loaded if need be; None if it has to wait for room. Raises ModelLoadError."""
        if runner := self.runners.get(local.name):
            return runner
        size = local.size // self._group.size
        while self._committed() + size > self.memory or len(self.runners) >= (
            self._max_loaded or math.inf
        ):
            if not self._unload_idle():
                return None
        self.prefixes.evict(spare=size)
        self._wire(size)
        try:
            runner = self.runners[local.name] = ModelRunner(
                local, renderer, self.prefixes, self._kv_bits, self._disk_cache, self._group
            )
        finally:
            self._clean()
        self.states[local.name] = runner.size, runner.state
        return runner

    def fits(self, runner: ModelRunner, job: Generation) -> bool:
        """Whether a request can begin now, when the prefix cache makes room for it. Raises
        PromptTooLong if it never can."""
        need = runner.reserve(job)
        while self._committed() + need > self.memory:
            if self._unload_idle(runner):
                continue
            if self.jobs():
                return False
            if (most := self.context(runner.local.name)) is not None and job.prompt_tokens >= most:
                raise PromptTooLong(job.prompt_tokens, most)
            break  # less is left for the answer than is usual
        return True

    def rebalance(self) -> Generation | None:
        """Adapts the prefix cache to what the others take. When they take too much, pauses a
        request and returns it."""
        paused = None
        if self._committed() > self.memory and len(self.jobs()) > 1:
            running = [
                (job, runner) for runner in self.runners.values() for job in runner.decoding()
            ]
            latest, runner = max(
                running,
                key=lambda pair: (pair[0].request.priority, pair[0]._born),
                default=(None, None),
            )
            paused = latest if latest and runner.pause(latest) else None
        self.prefixes.evict()
        return paused

    def _unload_idle(self, spared: ModelRunner | None = None) -> bool:
        idle = {name: r.used for name, r in self.runners.items() if not r.jobs and r is not spared}
        if idle:
            self.unload(min(idle, key=idle.get))
        return bool(idle)

    def unload(self, name: str) -> None:
        """Gives an idle model's weights and states back to the system, if nobody else holds the
        runtime."""
        runner = self.runners[name]
        while runner.unwritten():
            runner.write()
        self.prefixes.drop(runner.fingerprint)
        del self.runners[name], runner
        self._clean()
        log.info("unloaded %s", name)

    def _clean(self) -> None:
        import mlx.core as mx

        gc.collect()
        mx.clear_cache()
        self._wire()

    def _wire(self, coming: int = 0) -> None:
        """Keeps the weights in memory, and as many bytes of those that are to be loaded. States
        come and go, which has made macOS panic where they were wired, too:
        https://github.com/ml-explore/mlx/issues/3186"""
        import mlx.core as mx

        if mx.metal.is_available():
            mx.set_wired_limit(
                min(usable_memory(), coming + sum(runner.size for runner in self.runners.values()))
            )

    def forget(self) -> list[Generation]:
        """Drops everything, as after a failure that leaves nothing to rely on; returns the requests
        that ran."""
        jobs = self.jobs()
        self.runners, self.prefixes = {}, PrefixCache(self._spare, self._group)
        self._clean()
        return jobs
