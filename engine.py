"""The engine room: local MLX models, their prompts, their KV caches and their output.

It knows models and tokens; it knows no HTTP and no vendor's JSON. A caller hands in a `Request`
(the canonical conversation) and iterates the `Generation` it gets back: a stream of `Event`s.

The threading rule. All MLX work (load, prefill, decode, cache copy and trim, unload) happens on ONE
thread that the `Engine` owns. Callers' threads resolve names, render and tokenise prompts, which
needs no MLX array. Both sides meet under ONE lock, `Engine._lock`, a Condition that guards the
inbox, the outboxes and the model table. It is never held during MLX work, tokenisation or I/O."""

from __future__ import annotations

import importlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _mlx_server.inference.disk_cache import DiskCache
from _mlx_server.inference.generation import Generation, Phase
from _mlx_server.inference.group import Group
from _mlx_server.inference.library import Library
from _mlx_server.inference.memory import gigabytes, usable_memory
from _mlx_server.inference.models import (
    Loaded,
    LocalModel,
    fingerprint,
    read_chat_template,
    read_json_file,
)
from _mlx_server.inference.names import plain_name
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.presets import Preset
from _mlx_server.inference.prompt import Prompt
from _mlx_server.inference.protocol import (
    Done,
    Embedding,
    EngineBusy,
    EngineClosed,
    EngineError,
    Event,
    InvalidRequest,
    Message,
    Miss,
    ModelLoadError,
    ModelNotFound,
    Priority,
    PromptTooLong,
    Request,
    Sampling,
    Stats,
    Text,
    Thinking,
    Tick,
    Token,
    ToolEnd,
    ToolInput,
    ToolStart,
    Totals,
    Usage,
    fill_sampling,
)
from _mlx_server.inference.ranks import Ranks
from _mlx_server.inference.renderer import PromptRenderer
from _mlx_server.inference.runner import ModelRunner
from _mlx_server.inference.scheduler import Scheduler

__all__ = [
    "Done",
    "Embedding",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "EngineError",
    "Event",
    "Generation",
    "Group",
    "InvalidRequest",
    "Library",
    "Loaded",
    "LocalModel",
    "Message",
    "Miss",
    "ModelLoadError",
    "ModelNotFound",
    "Preset",
    "Priority",
    "PromptTooLong",
    "Ranks",
    "Request",
    "Sampling",
    "Stats",
    "Text",
    "Thinking",
    "Tick",
    "Token",
    "ToolEnd",
    "ToolInput",
    "ToolStart",
    "Totals",
    "Usage",
]

log = logging.getLogger("mlx_server")


@dataclass
class StepInput:
    """What callers want of a step: the requests that wait, in the order they came, and those that
    are cancelled."""

    waiting: list[Generation]
    cancelled: list[Generation]


class Engine:
    """Local MLX models behind one thread.

        with Engine("demo") as engine:
            answer = engine.chat("say hello world")
            for piece in answer.text():
                print(piece, end="", flush=True)
            print(answer.usage)

    `model` is the default model (a name or a path) and begins to load at once; `models_dirs` are
    folders of models, `aliases` pairs of (glob, name), `context` and `max_tokens` upper bounds in
    tokens, `cache_limit` the prefix cache's bytes (by default a quarter of `memory`). `cache_dir`
    is a folder where the prefix cache outlives the process, `cache_dir_limit` the most bytes of
    files in it. `kv_bits` (4 or 8) keeps the KV cache quantised. `memory` is the bytes that
    weights, KV and prefix cache may take together (by default nine tenths of what the GPU may use,
    the rest being for computing), `max_loaded` the number of models, `max_queue` the number of
    requests that may wait, `keep_alive` the seconds that an idle model stays (None: until its
    memory is needed). `state` is the file where presets are kept (None: nowhere, they end with the
    engine). With a `group` of several processes each makes the same engine, with a `model`, the
    only one then, and without a `cache_dir`; those that are not rank 0 `follow`. Raises
    ModelNotFound or ModelLoadError for a bad `model`, OSError for a `cache_dir` that cannot be
    written to."""

    WRITE_DELAY = 1.0  # seconds without work after which the prefix cache is written to disk
    LAST_WRITES = 2.5  # seconds that closing may spend on that
    STUCK = 600.0  # seconds after which a single step counts as hanging

    def __init__(
        self,
        model: str | None = None,
        *,
        models_dirs: Sequence[str | Path] = (),
        aliases: Sequence[tuple[str, str]] = (),
        context: int | None = None,
        max_tokens: int | None = None,
        cache_limit: int | None = None,
        cache_dir: str | Path | None = None,
        cache_dir_limit: int = 32 * 2**30,
        kv_bits: int | None = None,
        memory: int | None = None,
        max_loaded: int | None = None,
        max_queue: int = 64,
        keep_alive: float | None = None,
        state: str | Path | None = None,
        group: Group = Group(),
    ):
        self._group = group
        self._library = Library(
            [Path(d) for d in models_dirs], aliases, Path(state).expanduser() if state else None
        )
        self._default = self._library.resolve(model, trusted=True) if model else None
        self._library.only = self._default if group.size > 1 else None
        self._context, self._max_tokens, self._kv_bits = context, max_tokens, kv_bits
        self._max_queue, self._keep_alive = max_queue, keep_alive
        self._disk_cache = DiskCache(Path(cache_dir), cache_dir_limit) if cache_dir else None
        memory = memory or group.memory() * 9 // 10
        self._mutex = threading.RLock()
        self._lock = threading.Condition(self._mutex)
        self._queue: list[Generation] = []
        self._renderers: dict[str, PromptRenderer | None] = {}  # None while a thread builds it
        self._unloads: list[tuple[str, threading.Event]] = []
        self._last_used: LocalModel | None = None
        self._pool = ModelPool(
            memory, cache_limit or memory // 4, max_loaded, kv_bits, self._disk_cache, group
        )
        if self._default is not None:
            self._check_size(self._default)
        self._scheduler = Scheduler()
        self._totals = Totals()
        self._ready = self._draining = self._closing = False
        self._broken: str | None = None
        # Since when the current step runs, in monotonic seconds
        self._stepping: float | None = None
        group.start(self._replicate, self._on_lost)
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- callers' side

    @property
    def hub(self) -> Path:
        """The folder where downloaded models are found."""
        return self._library.hub

    def models(self) -> list[LocalModel]:
        """Every model that can be served, presets as models of their names."""
        return self._library.catalog()

    def preset(self, name: str) -> Preset | None:
        """The preset that `name` means."""
        return self._library.preset(name)

    def keep(self, preset: Preset) -> None:
        """Adds a preset or replaces that of its name. Raises InvalidRequest for the name of an
        installed model."""
        if any(plain_name(preset.name) == model.name.lower() for model in self._library.models()):
            raise InvalidRequest(f"'{preset.name}' is the name of an installed model; take another")
        self._library.presets.put(preset)

    def delete(self, name: str) -> None:
        """Removes a preset or, once its running requests are through, a model with its files.
        Raises ModelNotFound, and InvalidRequest if it is not named in full or not ours to
        delete."""
        if self._library.presets.remove(name):
            return
        local = self.resolve(name)
        self._library.delete(name, local, self._let_go)

    def _let_go(self, local: LocalModel) -> None:
        if local == self._default:
            raise InvalidRequest(f"model '{local.name}' is not this server's to delete")
        self.unload(local.name)
        with self._lock:
            self._renderers.pop(local.name, None)
            self._last_used = None if self._last_used == local else self._last_used

    def resolve(self, name: str) -> LocalModel:
        """The local model that answers to `name`. Raises ModelNotFound."""
        if self._default is not None and name in (str(self._default.path), self._default.name):
            return self._default
        return self._library.resolve(name, default=self._default, last_used=self._last_used)

    def show(self, local: LocalModel) -> tuple[str, dict[str, Any]]:
        """A model's chat template and its generation_config.json."""
        files = {path.name: path.stat() for path in local.path.iterdir()}
        return read_chat_template(local.path, files), read_json_file(
            local.path / "generation_config.json"
        ) if ("generation_config.json" in files) else {}

    def context_length(self, local: LocalModel) -> int:
        """Tokens of prompt and answer together that a request may have: what the model, `context`
        and, once the model has been loaded, memory allow."""
        bounds = [local.context_length, self._context, self._pool.context(local.name)]
        return min(bound for bound in bounds if bound is not None)

    def chat(self, messages: str | list[Message], **fields: Any) -> Generation:
        """Starts an answer to a text or a conversation; `fields` are those of `Request`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        name = fields.pop("model", None) or (self._default.name if self._default else "default")
        return self.submit(Request(name, messages, **fields))

    def submit(self, request: Request) -> Generation:
        """Queues a request. What can be wrong with it is raised here: ModelNotFound, ModelLoadError
        (no tokenizer), InvalidRequest (the template refuses it, its format cannot be enforced, or
        there is no such token), PromptTooLong, EngineBusy, EngineClosed."""
        local, request = self.resolve(request.model), self._preset(request)
        self._check_open()
        renderer = self._renderer(local)
        request.sampling = fill_sampling(request.sampling, renderer.defaults)
        given = request.prompt if isinstance(request.prompt, list) else []
        renderer.check_tokens([*(request.sampling.logit_bias or ()), *request.context, *given])
        prompt = renderer.prompt(request) if request.messages or request.prompt else Prompt([])
        if request.embed:
            if not prompt.tokens:
                raise InvalidRequest("a text without tokens has no embedding")
            if local.config.get("use_bidirectional_attention"):
                raise InvalidRequest(
                    f"model '{local.name}' reads text in both directions, which mlx-lm cannot"
                )
            prompt = (
                renderer.truncated(prompt, self.context_length(local) - 1)
                if request.truncate
                else prompt
            )
        limit, by_context = self._room(local, request, len(prompt.tokens))
        job = Generation(request, local, renderer, prompt, limit, by_context, self._mutex)
        if not request.embed:
            self._look_up(job)
        with self._lock:
            self._check_open()
            self._last_used = local
            self._queue.append(job)
            self._lock.notify_all()
        return job

    def _preset(self, request: Request) -> Request:
        preset = self.preset(request.model)
        return preset.fill(request) if preset else request

    def _check_open(self) -> None:
        if self._draining or self._closing or self._broken:
            raise EngineClosed(self._broken or "the server is shutting down")
        if self._waiting() >= self._max_queue:
            raise EngineBusy(f"{self._max_queue} requests are waiting already")

    def _waiting(self) -> int:
        jobs = [*self._queue, *self._pool.jobs()]
        return sum(job._phase is Phase.WAITING and not job._cancelled for job in jobs)

    def _look_up(self, job: Generation) -> None:
        """Notes what of a prompt was read before, as far as that is known now."""
        tokens, prefixes = job._prompt.tokens, self._pool.prefixes
        runner = self._pool.runners.get(job.model.name)
        if runner is None and self._disk_cache is None:
            return
        model = runner.fingerprint if runner else fingerprint(job.model, self._kv_bits)
        job.cached_tokens = prefixes.find(model, tokens)[1]
        job.miss = self._miss(prefixes.closest(model, tokens), job)
        if self._disk_cache is not None:
            kept = self._disk_cache.find(model, tokens[:-1])[1]
            job.cached_tokens, job.miss = (
                max(kept, job.cached_tokens),
                job.miss if kept <= job.cached_tokens else None,
            )

    def _miss(self, closest: tuple[list[int], int], job: Generation) -> Miss | None:
        """Where the prompt and the cached one most like it part, if they do."""
        tokens = job._prompt.tokens
        was, at = closest
        if not 0 < at < min(len(was), len(tokens)):
            return None
        decode = job._renderer.tokenizer.decode
        index, role = job._renderer.locate(job.request, decode(tokens[:at])) or (None, "")
        return Miss(at, index, role, decode(was[at : at + 8]), decode(tokens[at : at + 8]))

    def count_tokens(self, request: Request) -> int:
        """Prompt tokens of a request, rendered just as `submit` does. Raises as `submit`, but never
        for length."""
        return len(self._renderer(self.resolve(request.model)).prompt(self._preset(request)).tokens)

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        # What is told is the wall's time, what is measured is not
        pool, ahead = self._pool, time.time() - time.monotonic()
        return [
            Loaded(
                r.local,
                r.size + pool.prefixes.held(r.fingerprint),
                None if (at := r.expires) is None else at + ahead,
                self.context_length(r.local),
            )
            for r in list(pool.runners.values())
        ]

    def unload(self, name: str) -> None:
        """Frees a model once its running requests are through, and returns then. Raises
        ModelNotFound."""
        done = threading.Event()
        with self._lock:
            self._unloads.append((self.resolve(name).name, done))
            self._lock.notify_all()
        while not done.wait(0.2) and self._thread.is_alive():
            pass

    def health(self) -> str | None:
        """What is wrong with the engine, or None. Answers at once, whatever the engine does."""
        since = self._stepping
        if self._broken or not self._thread.is_alive():
            return self._broken or "the engine has stopped"
        if self._draining or self._closing:
            return "the server is shutting down"
        return (
            "the engine hangs"
            if since is not None and time.monotonic() - since > self.STUCK
            else None
        )

    @property
    def broken(self) -> bool:
        """Whether it has failed for good, which only a new process changes."""
        return bool(self._broken)

    def stats(self) -> Stats:
        """Figures of this moment."""
        from mlx.core import get_active_memory

        pool = self._pool
        running = sum(job._phase is not Phase.WAITING for job in pool.jobs())
        return Stats(
            self._waiting(),
            running,
            len(pool.runners),
            pool.prefixes.nbytes,
            pool.prefixes.limit,
            get_active_memory(),
            pool.memory,
            self._totals,
        )

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits at most so long for those there are."""
        deadline = time.monotonic() + seconds
        with self._lock:
            self._draining = True
            while (
                (self._queue or self._pool.jobs())
                and not (self._closing or self._broken)
                and self._thread.is_alive()
                and (time.monotonic() < deadline)
            ):
                self._lock.wait(0.05)

    def close(self, grace: float = 4.0) -> bool:
        """Ends running work with EngineClosed, frees the models and joins the thread, waiting at
        most `grace` seconds.

        Returns whether the thread has ended; a step on the GPU cannot be interrupted.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(grace)
        return not self._thread.is_alive()

    def follow(self) -> bool:
        """Does what rank 0 decides, until it ends; returns whether all went well."""
        self._thread.join()
        return not self.broken

    def _replicate(
        self, request: Request, prompt: Prompt, limit: int, by_context: bool, born: float
    ) -> Generation:
        """This process's own of a request that has come to rank 0."""
        job = Generation(
            request,
            self._default,
            self._renderer(self._default),
            prompt,
            limit,
            by_context,
            self._mutex,
        )
        job._born = born
        return job

    def _on_lost(self, reason: str) -> None:
        """Ends everything, as a signal would: a process of the group is gone, for which the MLX
        thread may wait for ever."""
        self._broken = reason
        with self._lock:
            jobs = [*self._queue, *self._pool.jobs()]
            self._lock.notify_all()
        for job in jobs:
            job._fail(EngineClosed(reason))
        os.kill(os.getpid(), signal.SIGTERM)

    def _renderer(self, local: LocalModel) -> PromptRenderer:
        with self._lock:
            while not self._ready or self._renderers.get(local.name, ...) is None:
                if self._closing or self._broken:
                    raise EngineClosed(self._broken or "the server is shutting down")
                self._lock.wait()
            if local.name in self._renderers:
                return self._renderers[local.name]
            self._renderers[local.name] = None
        try:
            renderer = PromptRenderer(local)
            if self._disk_cache is not None:
                renderer.learn(self._disk_cache.answers(fingerprint(local, self._kv_bits)))
        except BaseException:
            with self._lock:
                del self._renderers[local.name]
                self._lock.notify_all()
            raise
        with self._lock:
            self._renderers[local.name] = renderer
            self._lock.notify_all()
        return renderer

    def _room(self, local: LocalModel, request: Request, prompt: int) -> tuple[int, bool]:
        """How many tokens may be generated, and whether the context window is what bounds them."""
        context = self.context_length(local)
        if prompt and prompt >= context:
            raise PromptTooLong(prompt, context)
        asked = [n for n in (request.max_tokens, self._max_tokens) if n is not None]
        room = context - prompt
        return min([room, *asked]), not asked or min(asked) > room

    # -- the MLX thread

    def _main(self) -> None:
        try:
            import mlx.core as mx

            # Slow: done here so that callers need not wait for it
            importlib.import_module("mlx_lm.generate")
            if mx.metal.is_available():
                usable = usable_memory()
                mx.set_memory_limit(usable)
                mx.set_cache_limit(usable // 16)  # freed buffers that MLX keeps for itself
            with self._lock:
                self._ready = True
                self._lock.notify_all()
            if self._default is not None:
                self._preload(self._default)
            while turn := self._group.broadcast(self._wait):
                self._guarded_step(turn)
                if self._group.lost:
                    self._broken = self._group.lost
                    return
            self._group.close()
        except Exception:
            log.critical("the engine has stopped", exc_info=True)
            self._broken = "the engine has stopped after an internal error"
        finally:
            self._shutdown()

    def _preload(self, local: LocalModel) -> None:
        """Loads the default model before anyone asks for it; a failure is reported again to whoever
        does."""
        try:
            self._open(local, self._renderer(local))
        except EngineError as error:
            log.error("%s", error)
            self._group.give_up(str(error))

    def _check_size(self, local: LocalModel) -> None:
        memory, size = self._pool.memory, local.size // self._group.size
        if size <= memory:
            return
        fitting = [
            model
            for model in self._library.models()
            if model.size <= memory and "completion" in model.capabilities
        ]
        best = max(fitting, key=lambda model: model.size, default=None)
        raise ModelLoadError(
            f"model '{local.name}' needs {gigabytes(size)} of memory, and {gigabytes(memory)} can be used; "
            + (
                f"'{best.name}' ({gigabytes(best.size)}) fits"
                if best
                else "take a smaller or more quantised one"
            )
        )

    def _open(self, local: LocalModel, renderer: PromptRenderer) -> ModelRunner | None:
        try:
            self._check_size(local)
            if local.name not in self._pool.runners:
                self._synchronize()
            runner = self._pool.open(local, renderer)
        except ModelLoadError as error:
            self._group.give_up(str(error))
            raise
        if runner is not None and runner.keep_alive is None:
            runner.keep_alive = self._keep_alive
        return runner

    def _wait(self) -> StepInput | None:
        """Sleeps until there is work; None when the engine is to end."""
        self._stepping = None
        with self._lock:
            while not self._closing:
                if self._queue or self._unloads or self._pool.jobs():
                    self._stepping = time.monotonic()
                    cancelled = [
                        job for job in [*self._queue, *self._pool.jobs()] if job._cancelled
                    ]
                    self._queue = [job for job in self._queue if not job._cancelled]
                    return StepInput(self._queue.copy(), cancelled)
                runners = self._pool.runners.values()
                writes = [
                    runner.used + self.WRITE_DELAY for runner in runners if runner.unwritten()
                ]
                due = min(
                    [*writes, *(r.expires for r in runners if r.expires is not None)], default=None
                )
                if due is not None and due <= time.monotonic():
                    return StepInput([], [])
                self._lock.wait(None if due is None else max(0.01, due - time.monotonic()))
            return None

    def _guarded_step(self, turn: StepInput) -> None:
        """A step that cannot end the thread: what nobody below caught costs the running requests
        and the loaded models, whose state is unknown then, and nothing else."""
        try:
            self._step(turn)
            self._tidy()
        except Exception as error:
            self._group.failed(error)
            log.critical("unexpected failure in the engine", exc_info=True)
            for job in self._pool.forget():
                job._fail(EngineError("the engine failed; it starts afresh, please try again"))

    def _step(self, turn: StepInput) -> None:
        """Ends what was cancelled, takes in what is new, reads a chunk of one prompt, adds a token
        to each answer."""
        jobs = self._pool.jobs()
        if turn.cancelled:
            self._synchronize()
        for runner in self._pool.runners.values():
            # First, so that the same request sent again finds what was computed
            runner.drop_cancelled(turn.cancelled)
        jobs += self._admit(turn.waiting)
        if paused := self._pool.rebalance():
            log.info(
                "out of memory for all answers at once: one waits after %d tokens",
                paused.usage.completion_tokens,
            )
            with self._lock:
                self._queue.insert(0, paused)
        runners = list(self._pool.runners.values())
        decoding = [job for runner in runners for job in runner.decoding()]
        owner = {job: runner for runner in runners for job in runner.candidates()}
        started = time.perf_counter()
        if chosen := owner and self._group.broadcast(
            lambda: self._scheduler.choose(list(owner), decoding)
        ):
            self._synchronize()
            owner[chosen].prefill(chosen, alone=len(self._pool.jobs()) == 1)
            self._scheduler.prefilled(chosen, time.perf_counter() - started, decoding)
            started = time.perf_counter()
        for runner in runners:
            if len(runners) > 1:
                self._synchronize()
            runner.decode()
        self._scheduler.decoded(time.perf_counter() - started)
        self._count(jobs)

    def _synchronize(self) -> None:
        """Waits for the tokens that are being computed, before anything else is: MLX tells of a
        failure whoever comes next, and leaves those whose tokens it were with wrong ones."""
        import mlx.core as mx

        try:
            mx.synchronize()
        except Exception as error:
            for runner in self._pool.runners.values():
                if runner.decoding():
                    runner.isolate_failed_batch(error)

    def _admit(self, waiting: list[Generation]) -> list[Generation]:
        """Lets requests in, the highest priority first and then as they came, until one has to wait
        for a model or for memory; then everyone behind it waits, too. Returns those that are in."""
        admitted: list[Generation] = []
        if self._group.rank:
            self._queue = waiting.copy()
        for job in sorted(waiting, key=lambda job: job.request.priority):
            try:
                runner = self._open(job.model, job._renderer)
                if runner is None or not self._pool.fits(runner, job):
                    break
            except EngineError as error:
                self._leave_queue(job)
                self._totals.endings[type(error).__name__] += 1
                job._fail(error)
                continue
            self._leave_queue(job)
            self._synchronize()
            runner.admit(job)
            admitted.append(job)
        return admitted

    def _leave_queue(self, job: Generation) -> None:
        with self._lock:
            self._queue.remove(job)

    def _count(self, jobs: list[Generation]) -> None:
        """Adds those requests that have ended to the totals."""
        for job in jobs:
            if job._phase is Phase.ENDED:
                self._totals.endings[job.ending] += 1
                self._totals.prompt_tokens += job.prompt_tokens
                self._totals.cached_tokens += job.usage.cached_tokens
                self._totals.completion_tokens += job.usage.completion_tokens

    def _tidy(self) -> None:
        """Unloads what is due and not in use, and writes to disk when there is nothing else to
        do."""
        pool, now = self._pool, time.monotonic()

        def due() -> list[str]:
            with self._lock:
                asked = {name for name, _ in self._unloads}
            return [
                name
                for name in idle
                if name in asked or (pool.runners[name].expires or math.inf) <= now
            ]

        idle = [name for name, runner in pool.runners.items() if not runner.jobs]
        for name in idle and self._group.broadcast(due):
            pool.unload(name)
        if not self._queue and not pool.jobs():
            settled = (
                r
                for r in pool.runners.values()
                if r.unwritten() and now >= r.used + self.WRITE_DELAY
            )
            if runner := next(settled, None):
                runner.write()  # only one segment: someone may be waiting by then
        with self._lock:
            for name, done in self._unloads:
                if name not in pool.runners:
                    done.set()
            self._unloads = [(name, done) for name, done in self._unloads if name in pool.runners]
            self._lock.notify_all()  # whoever waits for the end of the work

    def _shutdown(self) -> None:
        with self._lock:
            self._closing = True
            jobs, self._queue = [*self._queue, *self._pool.jobs()], []
            self._lock.notify_all()
        for job in jobs:
            job._fail(EngineClosed(self._broken or "the server is shutting down"))
        if self._disk_cache is not None and not self._broken:
            self._last_writes()
        for _, done in self._unloads:
            done.set()
        if self._ready and not self._group.lost:  # a torn connection would hold MLX for ever
            import mlx.core as mx

            self._pool.forget()
            mx.clear_streams()  # their threads must not outlive this one

    def _last_writes(self) -> None:
        """Takes what the running requests have computed and writes what there is time for."""
        until = time.monotonic() + self.LAST_WRITES
        try:
            for runner in self._pool.runners.values():
                for job in runner.jobs:
                    job._cancelled, job._phase = (
                        True,
                        Phase.DECODE if job._number else Phase.PREFILL,
                    )
                runner.drop_cancelled(runner.jobs)
                while runner.unwritten() and time.monotonic() < until:
                    runner.write()
        except Exception:
            log.error("the prefix cache could not be written", exc_info=True)
