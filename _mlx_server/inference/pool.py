"""The models in memory, and which of them gets how much of it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.cache.prefix_cache import PrefixCache
from _mlx_server.inference.catalog.models import Loaded, LocalModel, load_error
from _mlx_server.inference.catalog.mtp_files import Identity, weights_size
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import (
    StateSize,
    gigabytes,
    release_free_memory,
    usable_memory,
)
from _mlx_server.inference.protocol import (
    EngineBusy,
    EngineError,
    LoadPutOff,
    ModelLoadError,
    Priority,
    PromptTooLong,
)
from _mlx_server.inference.sequence import Sequence

if TYPE_CHECKING:
    from _mlx_server.inference.decoding.runner import ModelRunner
    from _mlx_server.inference.prompt.renderer import PromptRenderer

log = logging.getLogger("mlx_server")


class ModelPool:
    """The models in memory, and how memory is shared among them.

    Policy. The weights, the KV that admitted requests are expected to need, and the prefix cache
    stay within `memory` bytes together. A request that needs room gets it from the prefix cache
    first, then from idle models, the least recently used one going first, then from requests of
    lower priority, which are paused, and otherwise waits until others are through. When answers
    grow beyond what was expected, the latest request of the lowest priority is paused.
    `max_loaded` bounds the number of models. An idle model stays for `KEPT` seconds if only a
    request that is less important than its own were has a use for the room: it is refused. For
    requests of low priority no model is loaded while others are in work; those that have waited for
    that for `PUT_OFF` seconds are refused. At most `MOST_LOW` of them are in work themselves, as
    all share each step.

    Only the MLX thread changes it. Any thread may read it: the dicts are replaced by every
    change."""

    KEPT = 300.0
    MOST_LOW = 32  # a step for hundreds would take several times as long as one for the others
    PUT_OFF = 540.0  # vendors' clients wait for 600, and few of them come again more than twice
    # Seconds without work after which the prefix cache is written to disk, and free memory given
    # back
    WRITE_DELAY = 1.0

    def __init__(
        self,
        memory: int,
        cache_limit: int,
        max_loaded: int | None,
        kv_bits: int | None,
        disk_cache: DiskCache | None,
        group: Group,
        speculates: bool = False,
    ):
        self.memory, self._group = memory, group
        self._cache_limit, self._max_loaded = cache_limit, max_loaded
        self._kv_bits, self._disk_cache = kv_bits, disk_cache
        self.speculates = speculates and group.size == 1
        self.prefixes = PrefixCache(self._cache_room, group)
        self.runners: dict[str, ModelRunner] = {}  # by the model's name
        self._given_back = 0.0  # behind a request that has ended then, in monotonic seconds
        self._paused: list[Sequence] = []  # of which the engine does not know yet
        # By name of each model that was loaded once: bytes of the weights and of a state
        self._sizes: dict[str, tuple[int, StateSize]] = {}
        self._waiting: dict[str, tuple[LocalModel, int]] = {}  # bytes, by name, until it is loaded

    def set_up(self) -> None:
        """Imports what requests need, and bounds what MLX takes."""
        import mlx.core as mx

        # Slow, and the start needs none of it: done here, so that no caller waits for it later.
        # Modules stay, so the time to look for garbage among them would be lost
        collecting = gc.isenabled()
        gc.disable()
        try:
            for module in ("_mlx_server.inference.decoding.runner", "mlx_lm.generate"):
                importlib.import_module(module)
        finally:
            if collecting:
                gc.enable()
        if mx.metal.is_available():
            usable = usable_memory()
            mx.set_memory_limit(usable)
            mx.set_cache_limit(usable // 16)  # freed buffers that MLX keeps for itself

    def sequences(self) -> list[Sequence]:
        """All requests that were admitted and have not ended."""
        return [one for runner in self.runners.values() for one in runner.sequences]

    def loaded(self, context_length: Callable[[LocalModel], int]) -> list[Loaded]:
        """The models in memory, with the context length that requests to them may have."""
        # Expiry is measured by the monotonic clock and told by the wall's.
        ahead = time.time() - time.monotonic()
        loaded = []
        for runner in self.runners.values():
            size = runner.size + self.prefixes.held(runner.fingerprint)
            expires = runner.expires
            until = None if expires is None else expires + ahead
            loaded.append(Loaded(runner.local, size, until, context_length(runner.local)))
        return loaded

    def context(self, name: str) -> int | None:
        """Tokens of a conversation that memory can hold beside the model alone; None if that is not
        known or no bound."""
        if name not in self._sizes:
            return None
        weights, state_size = self._sizes[name]
        return state_size.tokens(self.memory - weights)

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return sum(runner.size for runner in self.runners.values())

    @property
    def states(self) -> int:
        """Bytes of what the running requests have read and written."""
        return sum(runner.held for runner in self.runners.values())

    @property
    def committed(self) -> int:
        """Bytes of the weights and of what running requests are expected to need."""
        return sum(runner.committed for runner in self.runners.values())

    def _room(self) -> int:
        """Bytes that are not committed."""
        return self.memory - self.committed

    def _cache_room(self) -> int:
        """Bytes that the prefix cache may take at the moment."""
        return min(self._cache_limit, self._room())

    def fingerprint(self, local: LocalModel) -> str:
        """What names the KV states of a model that is not loaded. From any thread."""
        return Identity.of(local, self._kv_bits, self.speculates).fingerprint

    def _size(self, local: LocalModel) -> int:
        """Bytes of this process's part of the weights of a model that is not loaded. Files are
        looked at once, however long it waits for room."""
        known = self._waiting.get(local.name)
        if known is None or known[0] is not local:
            try:
                size = weights_size(local, self.speculates) // self._group.size
            except Exception as error:  # files that have changed or gone since they were listed
                raise load_error(local, f"model '{local.name}'", error) from error
            known = self._waiting[local.name] = local, size
        return known[1]

    def puts_off(self, sequence: Sequence, most: float = math.inf) -> bool:
        """Whether a request has to wait until those of more than low priority are through, which
        the loading of its model would hold up. Raises LoadPutOff if it has waited for more than
        `most` seconds."""
        if sequence.request.priority is not Priority.LOW or sequence.model.name in self.runners:
            return False
        can_load = False
        with contextlib.suppress(ModelLoadError):
            can_load = self._size(sequence.model) <= self.memory
        if not can_load:
            return False  # it is refused at once
        if all(one.request.priority is Priority.LOW for one in self.sequences()):
            return False
        if time.perf_counter() - sequence.lap_start > most:
            raise LoadPutOff(
                f"model '{sequence.model.name}' is not in memory, and none is loaded for this "
                f"request while more important ones are in work; it has waited {most:.0f} seconds"
            )
        return True

    def open(
        self, local: LocalModel, renderer: PromptRenderer, priority: Priority
    ) -> ModelRunner | None:
        """The model, loaded if need be for a request; None if that has to wait for room. Raises
        ModelLoadError, and EngineBusy if idle models are kept from it."""
        from _mlx_server.inference.decoding.runner import ModelRunner  # see `set_up`

        if runner := self.runners.get(local.name):
            return runner
        size = self._size(local)
        while not self._has_room_for(size):
            if not self._unload_idle(priority):
                return None
        self.prefixes.evict(spare=size)
        self._wire(size)
        try:
            runner = ModelRunner(
                local,
                renderer,
                self.prefixes,
                self._kv_bits,
                self._disk_cache,
                self._group,
                self._room,
                self.speculates,
            )
        except BaseException as error:
            self._clean()
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            # Whatever its files cause concerns nobody but who asks for it
            raise load_error(local, f"model '{local.name}'", error) from error
        finally:
            self._waiting.pop(local.name, None)
        self.runners = {**self.runners, local.name: runner}
        self._settle()
        self._sizes = {**self._sizes, local.name: (runner.size, runner.state_size)}
        return runner

    def _has_room_for(self, size: int) -> bool:
        full = self._max_loaded is not None and len(self.runners) >= self._max_loaded
        return not full and self.committed + size <= self.memory

    def fits(self, runner: ModelRunner, sequence: Sequence) -> bool:
        """Whether a request can begin now, if the prefix cache makes room for it. Raises
        PromptTooLong if it never can, and EngineBusy if idle models are kept from it."""
        need, priority = runner.reserve(sequence), sequence.request.priority
        if priority is Priority.LOW and not self._make_place_for_low(sequence.request.client):
            return False
        while self.committed + need > self.memory:
            if self._unload_idle(priority, runner) or self._pause_lower(sequence, need):
                continue
            if self.sequences():
                return False
            most = self.context(runner.local.name)
            if most is not None and sequence.prompt_tokens >= most:
                raise PromptTooLong(sequence.prompt_tokens, most)
            break  # less is left for the answer than is usual
        return True

    def _make_place_for_low(self, client: str) -> bool:
        """Whether one more request of a client may be in work with low priority. If another client
        has so many of these places that one less is still no less than this one has, its latest
        request waits."""
        low = [pair for pair in self._running() if pair[0].request.priority is Priority.LOW]
        if len(low) < self.MOST_LOW:
            return True
        counts = Counter(one.request.client for one, _ in low)
        other, most = counts.most_common(1)[0]
        if most <= counts[client] + 1:
            return False
        why = "others have fewer requests in work"
        return self._pause_latest([pair for pair in low if pair[0].request.client == other], why)

    def _pause_lower(self, sequence: Sequence, need: int) -> bool:
        """Pauses a request of a lower priority, if it helps to pause all of them; returns whether
        it has."""
        priority = sequence.request.priority
        lower = [pair for pair in self._running() if pair[0].request.priority > priority]
        freed = sum(runner.reserve(one) for one, runner in lower)
        return self.committed + need - freed <= self.memory and self._pause_latest(lower)

    def rebalance(self) -> None:
        """Fits the prefix cache into the room that the requests leave. If they take too much
        themselves, pauses one of them."""
        if self.committed > self.memory and len(self.sequences()) > 1:
            self._pause_latest([pair for pair in self._running() if pair[0].decoding])
        self.prefixes.evict()

    def _running(self) -> list[tuple[Sequence, ModelRunner]]:
        """All requests that were admitted and have not ended, with their models."""
        return [(one, runner) for runner in self.runners.values() for one in runner.sequences]

    def _pause_latest(
        self,
        running: list[tuple[Sequence, ModelRunner]],
        why: str = "out of memory for all answers at once",
    ) -> bool:
        """Pauses the latest of the lowest priority among these requests; returns whether that was
        possible."""
        if not running:
            return False
        latest, runner = max(
            running, key=lambda pair: (pair[0].request.priority, pair[0].submitted)
        )
        if not runner.pause(latest):
            return False
        written = latest.usage.completion_tokens
        log.info("%s: one waits after %d tokens", why, written)
        self._paused.append(latest)
        return True

    def take_paused(self) -> list[Sequence]:
        """The requests that were paused since the last call, to be admitted once more."""
        paused, self._paused = self._paused, []
        return paused

    def check_size(self, local: LocalModel, installed: Callable[[], list[LocalModel]]) -> None:
        """Raises ModelLoadError for a model that never fits into memory, with advice which of the
        installed ones does."""
        if local.name in self.runners or (size := self._size(local)) <= self.memory:
            return
        advice = "take a smaller or more quantised one"
        chatting = [model for model in installed() if "completion" in model.capabilities]
        fitting = [model for model in chatting if model.size <= self.memory]
        if fitting:
            best = max(fitting, key=lambda model: model.size)
            advice = f"'{best.name}' ({gigabytes(best.size)}) fits"
        raise ModelLoadError(
            f"model '{local.name}' needs {gigabytes(size)} of memory, and "
            f"{gigabytes(self.memory)} can be used; {advice}"
        )

    @property
    def unmeasured(self) -> int:
        """How many models have passes that are still to be measured."""
        return sum(runner.unmeasured for runner in self.runners.values())

    def next_due(self) -> float | None:
        """When something has to be written, unloaded or given back next if nothing else happens, in
        monotonic seconds."""
        runners = self.runners.values()
        dues = [runner.used + self.WRITE_DELAY for runner in runners if runner.has_unwritten()]
        if self._given_back < self._last_used:
            dues.append(self._last_used + self.WRITE_DELAY)
        dues += [expires for runner in runners if (expires := runner.expires) is not None]
        return min(dues, default=None)

    def unload_due(self, wanted: set[str]) -> None:
        """Unloads the idle models that have expired or are `wanted` to go."""

        def due() -> list[str]:
            now = time.monotonic()
            return [
                name for name in idle if name in wanted or (idle[name].expires or math.inf) <= now
            ]

        idle = {name: runner for name, runner in self.runners.items() if not runner.sequences}
        names = self._group.broadcast(due) if idle else []
        idle.clear()  # or the weights would be held
        for name in names:
            self.unload(name)

    def use_pause(self, idle: bool, synchronize: Callable[[], None]) -> None:
        """Measures a pass or writes a segment to the disk cache if the engine is `idle`: only one,
        since a request may have come by then; and gives free memory back. As long as there are
        requests, each that ends lets its model measure a pass, since they may never cease to come;
        what is computed for the others is waited for before, by `synchronize`."""
        runners = self.runners.values()
        measuring = (one for one in runners if one.unmeasured and (idle or one.ended))
        if runner := next(measuring, None):
            synchronize()
            runner.measure()
        elif idle:
            self._write_segment()
            self._give_back()

    def _write_segment(self) -> None:
        """Writes one segment to the disk cache, if a model has been idle long enough."""
        for runner in self.runners.values():
            idle = time.monotonic() - runner.used
            if idle >= self.WRITE_DELAY and runner.has_unwritten():
                return runner.write()

    def _give_back(self) -> None:
        """Gives the system what is free, once for each time that nothing was in work for a while:
        to ask for it again takes longer."""
        import mlx.core as mx

        if self._given_back < self._last_used <= time.monotonic() - self.WRITE_DELAY:
            self._given_back = self._last_used
            mx.clear_cache()
            release_free_memory()

    @property
    def _last_used(self) -> float:
        """When a request has ended last, in monotonic seconds."""
        return max((runner.used for runner in self.runners.values()), default=0.0)

    def _unload_idle(self, priority: Priority, spared: ModelRunner | None = None) -> bool:
        """Unloads the least recently used idle model that need not be kept from a request of this
        priority; returns whether there was one. Raises EngineBusy if there are only others and
        nothing else makes room."""
        since = time.monotonic() - self.KEPT
        idle, kept = [], False
        for name, runner in self.runners.items():
            if runner.sequences or runner is spared:
                continue
            if any(used > since for other, used in runner.uses.items() if other < priority):
                kept = True
            else:
                idle.append(name)
        if idle:
            self.unload(min(idle, key=lambda name: self.runners[name].used))
        elif kept and not self.sequences():
            raise EngineBusy("the memory is kept for models of more important requests")
        return bool(idle)

    def unload(self, name: str) -> None:
        """Gives an idle model's weights and states back to the system, if no other object holds the
        runner."""
        runner = self.runners[name]
        while runner.has_unwritten():
            runner.write()
        self.prefixes.drop(runner.fingerprint)
        self.runners = {other: one for other, one in self.runners.items() if other != name}
        del runner
        self._clean()
        log.info("unloaded %s", name)

    def forget(self) -> list[Sequence]:
        """Drops everything, as after a failure that leaves nothing to rely on; returns the requests
        that ran."""
        sequences = [*self.take_paused(), *self.sequences()]
        self.runners, self.prefixes = {}, PrefixCache(self._cache_room, self._group)
        self._clean()
        return sequences

    def _clean(self) -> None:
        """Frees what nothing refers to any more but itself. It takes a while."""
        gc.collect()
        self._settle()
        release_free_memory()

    def _settle(self) -> None:
        """Gives buffers back that are not in use, and keeps the weights that there are."""
        import mlx.core as mx

        mx.clear_cache()
        self._wire()

    def _wire(self, coming: int = 0) -> None:
        """Keeps the weights in memory, and as many bytes of those that are to be loaded. States are
        not wired: as they come and go, macOS has panicked where they were
        (https://github.com/ml-explore/mlx/issues/3186)."""
        import mlx.core as mx

        if mx.metal.is_available():
            weights = coming + self.weights
            mx.set_wired_limit(min(usable_memory(), weights))
