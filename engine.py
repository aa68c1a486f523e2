"""The engine room: local MLX models, their prompts, their KV caches and their output.

It knows models and tokens; it knows no HTTP and no vendor's JSON. A caller hands in a `Request`
(the canonical conversation) and iterates the `Generation` it gets back: a stream of `Event`s.

The threading rule. All MLX work (load, prefill, decode, cache copy and trim, unload) happens on ONE
thread that the `Engine` owns. Callers' threads resolve names, render and tokenise prompts, which
needs no MLX array. Both sides meet under ONE lock, a Condition. It guards the requests that wait
for admission, the events of every request, the wishes to unload, and the flags that say whether the
engine is ready, draining or closing. It is never held during MLX work, tokenisation or I/O. What
callers read without it (the pool's models and their requests, the prefix cache, the disk cache, the
renderers) is replaced as a whole by the thread that changes it, and says so where it is defined.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.catalog.library import Library, expanded
from _mlx_server.inference.catalog.models import Loaded, LocalModel
from _mlx_server.inference.catalog.names import plain_name
from _mlx_server.inference.catalog.presets import Preset
from _mlx_server.inference.event_queue import EventQueue
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.group import Group, GroupLost
from _mlx_server.inference.images.image_layout import DEFAULT_TOKENS
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.prompt.lookup import Parting, describe_miss, look_up
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.prompt.renderers import RendererTable
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
from _mlx_server.inference.scheduler import Scheduler, StepInput, has_place
from _mlx_server.inference.sequence import Sequence, State

if TYPE_CHECKING:
    from _mlx_server.inference.decoding.runner import ModelRunner
    from _mlx_server.inference.prompt.renderer import PromptRenderer

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
    files in it (by default 16 GiB or a tenth of the free disk). `kv_bits` (4 or 8) keeps the KV
    cache quantised; without `speculation` each pass of a model gives an answer one token. `memory`
    is the bytes that weights, KV and prefix cache may take together (by default nine tenths of what
    the GPU may use, the rest being for computing), `max_loaded` the number of models, `max_queue`
    the number of requests that may wait, `keep_alive` the seconds that an idle model stays (None:
    until its memory is needed). An image has at most `image_tokens` tokens. `state` is the file
    where presets are kept (None: nowhere, they end with the engine). With a `group` of several
    processes each makes the same engine, with a `model`, the only one then, which sees no images,
    and without a `cache_dir`; those that are not rank 0 `follow`. Raises ModelNotFound or
    ModelLoadError for a bad `model`, OSError for a `cache_dir` that cannot be written to."""

    LAST_WRITES = 2.5  # seconds that closing may spend on writing the prefix cache to disk
    STUCK = 120.0  # seconds after which a step counts as hanging, the loading of models apart

    def __init__(
        self,
        model: str | None = None,
        *,
        models_dirs: Iterable[str | Path] = (),
        aliases: Iterable[tuple[str, str]] = (),
        context: int | None = None,
        max_tokens: int | None = None,
        cache_limit: int | None = None,
        cache_dir: str | Path | None = None,
        cache_dir_limit: int | None = None,
        kv_bits: int | None = None,
        speculation: bool = True,
        image_tokens: int = DEFAULT_TOKENS,
        memory: int | None = None,
        max_loaded: int | None = None,
        max_queue: int = 64,
        keep_alive: float | None = None,
        state: str | Path | None = None,
        group: Group | None = None,
    ):
        self._group = group or Group()
        folders = [Path(folder) for folder in models_dirs]
        presets = expanded(state) if state else None
        self._library = Library(folders, list(aliases), presets)
        self.default = self._library.resolve(model, trusted=True) if model else None
        if self.default is not None and self._group.size > 1:
            self._library.only = self.default
            self.default.capabilities = [
                one for one in self.default.capabilities if one != "vision"
            ]
        self._context, self._max_tokens = context, max_tokens
        self._image_tokens = image_tokens
        self._max_queue, self._keep_alive = max_queue, keep_alive
        self._disk_cache = DiskCache(Path(cache_dir), cache_dir_limit) if cache_dir else None
        memory = memory or self._group.memory() * 9 // 10
        bounds = memory, cache_limit or memory // 4, max_loaded
        self.pool = ModelPool(*bounds, kv_bits, self._disk_cache, self._group, speculation)
        if self.default is not None:
            self.pool.check_size(self.default, self._library.models)
        self._renderers = RendererTable(self._build_renderer)
        self._scheduler, self._totals = Scheduler(), Totals()
        self._last_used: dict[str, LocalModel] = {}  # by owner

        self._mutex = threading.RLock()
        self._lock = threading.Condition(self._mutex)
        self._queue: list[Sequence] = []
        self._unloads: list[tuple[str, threading.Event]] = []
        self._ready = self._draining = self._closing = False

        self._broken: str | None = None  # why only a new process can go on
        self._step_began: float | None = None  # the current step, in monotonic seconds
        self._group.start(self._replicate, self._on_lost)
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- models, from any thread

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
        if not self._library.presets.remove(name):
            self._library.delete(name, self.resolve(name), self._let_go)

    def _let_go(self, local: LocalModel) -> None:
        if local == self.default:
            raise InvalidRequest(f"model '{local.name}' is not this server's to delete")
        self.unload(local.name)
        self._renderers.forget(local)
        self._last_used = {owner: one for owner, one in self._last_used.items() if one != local}

    def resolve(self, name: str, owner: str = "") -> LocalModel:
        """The local model that answers to `name` for an owner. Raises ModelNotFound."""
        if self.default is not None and name in (str(self.default.path), self.default.name):
            return self.default
        used = self._last_used.get(owner)
        return self._library.resolve(name, default=self.default, last_used=used)

    def context_length(self, local: LocalModel) -> int:
        """Tokens of prompt and answer together that a request may have: what the model, `context`
        and, once the model has been loaded, memory allow."""
        bounds = [local.context_length, self._context, self.pool.context(local.name)]
        return min(bound for bound in bounds if bound is not None)

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        return self.pool.loaded(self.context_length)

    def unload(self, name: str) -> None:
        """Frees a model once its running requests are through, and returns then. Raises
        ModelNotFound."""
        done, local = threading.Event(), self.resolve(name)
        with self._lock:
            self._unloads.append((local.name, done))
            self._lock.notify_all()
        while not done.wait(0.2) and self._thread.is_alive():
            pass

    # -- requests, from any thread

    def chat(self, messages: str | list[Message], **fields: Any) -> Generation:
        """Starts an answer to a text or a conversation; `fields` are those of `Request`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        name = fields.pop("model", None) or (self.default.name if self.default else "default")
        return self.submit(Request(name, messages, **fields))

    def submit(self, request: Request, local: LocalModel | None = None) -> Generation:
        """Queues a request; `local` is its model if the caller has resolved the name. What can be
        wrong with it is raised here: ModelNotFound, ModelLoadError (no tokenizer), InvalidRequest
        (the template refuses it, its format cannot be enforced, or there is no such token),
        PromptTooLong, EngineBusy, EngineClosed."""
        local = local or self.resolve(request.model, request.owner)
        request = self._with_preset(request)
        self._check_open(request)
        renderer = self.renderer(local)
        request.sampling = fill_sampling(request.sampling, renderer.defaults)
        request.speculate = request.speculate and self.pool.speculates
        prompt = self._prompt(local, renderer, request)
        limit, by_context = self._answer_limit(local, request, len(prompt.tokens))
        events = EventQueue(self._mutex)
        sequence = Sequence(request, local, renderer, prompt, limit, by_context, events)
        parting = self._look_up(sequence)
        prompt.load_images(sequence.cached_tokens)
        generation = Generation(sequence, events)
        with self._lock:
            self._check_open(request)
            self._last_used = {**self._last_used, request.owner: local}
            self._queue.append(sequence)
            self._lock.notify_all()
        try:
            generation.miss = describe_miss(sequence, parting) if parting else None
        except BaseException:
            generation.cancel()
            raise
        return generation

    def count_tokens(self, request: Request) -> int:
        """Prompt tokens of a request, rendered just as `submit` does. Raises as `submit`, but never
        for length."""
        local = self.resolve(request.model, request.owner)
        renderer = self.renderer(local)
        window = self.context_length(local)
        return len(renderer.prompt(self._with_preset(request), window).tokens)

    def renderer(self, local: LocalModel) -> PromptRenderer:
        """A model's renderer, built if need be. Raises ModelLoadError, EngineClosed."""
        with self._lock:
            while not self._ready:
                if self._closing or self._broken:
                    raise EngineClosed(self._broken or "the server is shutting down")
                self._lock.wait()
        return self._renderers.get(local)

    def _build_renderer(self, local: LocalModel) -> PromptRenderer:
        from _mlx_server.inference.prompt.renderer import PromptRenderer  # see ModelPool.set_up

        if self._disk_cache is None:
            return PromptRenderer(local, self._image_tokens)
        readings = functools.partial(self._disk_cache.readings, self.pool.fingerprint(local))
        return PromptRenderer(local, self._image_tokens, readings)

    def _with_preset(self, request: Request) -> Request:
        preset = self.preset(request.model)
        return preset.fill(request) if preset else request

    def _check_open(self, request: Request) -> None:
        if self._draining or self._closing or self._broken:
            raise EngineClosed(self._broken or "the server is shutting down")
        waiting = self._waiting()
        if not has_place(request, waiting, self._max_queue):
            raise EngineBusy(f"{len(waiting)} requests are waiting already")

    def _waiting(self) -> list[Sequence]:
        """The requests that wait, cancelled ones apart."""
        with self._lock:
            sequences = [*self._queue, *self.pool.sequences()]
        return [one for one in sequences if one.state is State.WAITING and not one.cancelled]

    def _prompt(self, local: LocalModel, renderer: PromptRenderer, request: Request) -> Prompt:
        """The rendered request; without tokens if there is nothing to read."""
        given = request.prompt if isinstance(request.prompt, list) else []
        renderer.check_tokens([*(request.sampling.logit_bias or ()), *request.context, *given])
        prompt = Prompt([])
        if request.messages or request.prompt:
            window = self.context_length(local)
            prompt = renderer.prompt(request, window, most=window)
        if not request.embed:
            return prompt
        if not prompt.tokens:
            raise InvalidRequest("a text without tokens has no embedding")
        if local.config.get("use_bidirectional_attention"):
            message = f"model '{local.name}' reads text in both directions, which mlx-lm cannot"
            raise InvalidRequest(message)
        if request.truncate:
            return renderer.truncated(prompt, self.context_length(local) - 1)
        return prompt

    def _answer_limit(
        self, local: LocalModel, request: Request, prompt_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens may be generated, and whether the context window is what bounds them."""
        context = self.context_length(local)
        if prompt_tokens and prompt_tokens >= context:
            raise PromptTooLong(prompt_tokens, context)
        asked = [n for n in (request.max_tokens, self._max_tokens) if n is not None]
        room = context - prompt_tokens
        return min([room, *asked]), not asked or min(asked) > room

    def _look_up(self, sequence: Sequence) -> Parting | None:
        """Notes what of a prompt was read before, as far as that is known now."""
        runner = self.pool.runners.get(sequence.model.name)
        if sequence.request.embed or runner is None and self._disk_cache is None:
            return None
        model = runner.fingerprint if runner else self.pool.fingerprint(sequence.model)
        return look_up(sequence, model, self.pool.prefixes, self._disk_cache)

    # -- the engine itself, from any thread

    def health(self) -> str | None:
        """What is wrong with the engine, or None. Answers at once, whatever the engine does."""
        if self._broken or not self._thread.is_alive():
            return self._broken or "the engine has stopped"
        if self._draining or self._closing:
            return "the server is shutting down"
        return "the engine hangs" if self.hangs else None

    @property
    def hangs(self) -> bool:
        """Whether the current step has taken too long."""
        began = self._step_began
        return began is not None and time.monotonic() - began > self.STUCK

    @property
    def broken(self) -> bool:
        """Whether it has failed for good, which only a new process changes."""
        return bool(self._broken)

    def stats(self) -> Stats:
        """Figures of this moment."""
        from mlx.core import get_active_memory

        pool = self.pool
        return Stats(
            waiting=len(self._waiting()),
            max_waiting=self._max_queue,
            running=sum(one.state is not State.WAITING for one in pool.sequences()),
            loaded=len(pool.runners),
            unmeasured=pool.unmeasured,
            weights=pool.weights,
            states=pool.states,
            prefix_cache_bytes=pool.prefixes.nbytes,
            prefix_cache_limit=pool.prefixes.limit,
            memory=get_active_memory(),
            memory_limit=pool.memory,
            totals=self._totals,
        )

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits at most so long for those there are."""
        deadline = time.monotonic() + seconds
        with self._lock:
            self._draining = True
            while self._queue or self.pool.sequences():
                over = self._closing or self._broken or not self._thread.is_alive()
                if over or time.monotonic() >= deadline:
                    return
                self._lock.wait(0.05)

    def close(self, grace: float = 4.0) -> bool:
        """Ends running work with EngineClosed, frees the models and joins the thread, waiting at
        most `grace` seconds. Returns whether the thread has ended; a step on the GPU cannot be
        interrupted."""
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
        self, request: Request, prompt: Prompt, limit: int, by_context: bool, submitted: float
    ) -> Sequence:
        """This process's own sequence for a request that has come to rank 0."""
        assert self.default is not None
        renderer, events = self.renderer(self.default), EventQueue(self._mutex)
        sequence = Sequence(request, self.default, renderer, prompt, limit, by_context, events)
        sequence.submitted = submitted
        return sequence

    def _on_lost(self, reason: str) -> None:
        """Ends everything: a process of the group is gone, and the MLX thread may wait for it for
        ever."""
        self._broken = reason
        with self._lock:
            sequences = [*self._queue, *self.pool.sequences()]
            self._lock.notify_all()
        for sequence in sequences:
            sequence.fail(EngineClosed(reason))

    # -- the MLX thread

    def _main(self) -> None:
        try:
            self._set_up()
            if self.default is not None:
                self._preload(self.default)
            while step := self._group.broadcast(self._wait):
                self._guarded_step(step)
                if self._group.lost:
                    self._broken = self._group.lost
                    return
            self._group.close()
        except GroupLost:
            self._broken = self._broken or self._group.lost
        except Exception:
            log.critical("the engine has stopped", exc_info=True)
            self._broken = "the engine has stopped after an internal error"
        finally:
            self._shut_down()

    def _set_up(self) -> None:
        self.pool.set_up()
        with self._lock:
            self._ready = True
            self._lock.notify_all()

    def _preload(self, local: LocalModel) -> None:
        """Loads the default model before anyone asks for it; a failure is reported again to whoever
        does."""
        try:
            self._open(local, self.renderer(local), Priority.HIGH)
        except EngineError as error:
            log.error("%s", error)
            self._group.give_up(str(error))

    def _open(
        self, local: LocalModel, renderer: PromptRenderer, priority: Priority
    ) -> ModelRunner | None:
        """The model, loaded if need be; None if it has to wait for room."""
        try:
            self.pool.check_size(local, self._library.models)
            if local.name not in self.pool.runners:
                self._synchronize()
            with self._not_hanging():
                runner = self.pool.open(local, renderer, priority)
        except ModelLoadError as error:
            self._group.give_up(str(error))
            raise
        if runner is not None and runner.keep_alive is None:
            runner.keep_alive = self._keep_alive
        return runner

    @contextlib.contextmanager
    def _not_hanging(self) -> Iterator[None]:
        """For what may take as long as it will within a step."""
        began, self._step_began = self._step_began, None
        try:
            yield
        finally:
            self._step_began = time.monotonic() if began is not None else None

    def _wait(self) -> StepInput | None:
        """Sleeps until there is work; None when the engine is to end."""
        self._step_began = None
        with self._lock:
            while not self._closing:
                sequences = [*self._queue, *self.pool.sequences()]
                if sequences or self._unloads or self.pool.unmeasured:
                    self._step_began = time.monotonic()
                    cancelled = [one for one in sequences if one.cancelled]
                    self._queue = [one for one in self._queue if not one.cancelled]
                    return StepInput(self._queue.copy(), cancelled)
                due = self.pool.next_due()
                if due is not None and due <= time.monotonic():
                    return StepInput([], [])
                self._lock.wait(None if due is None else max(0.01, due - time.monotonic()))
            return None

    def _guarded_step(self, step: StepInput) -> None:
        """A step that cannot end the thread: a failure that was not handled below costs the running
        requests and the loaded models, whose state is unknown then, and nothing else."""
        try:
            self._step(step)
            self._tidy()
        except Exception as error:
            self._group.failed(error)
            log.critical("unexpected failure in the engine", exc_info=True)
            for sequence in self.pool.forget():
                sequence.fail(EngineError("the engine failed; it starts afresh, please try again"))

    def _step(self, step: StepInput) -> None:
        """Ends what was cancelled, takes in what is new, reads a chunk of one prompt, adds a token
        to each answer."""
        sequences = self.pool.sequences()
        if step.cancelled:
            self._synchronize()
        # First, so that the same request sent again finds what was computed.
        for runner in self.pool.runners.values():
            runner.end_cancelled(step.cancelled)
        sequences += self._admit(step.waiting)
        self.pool.rebalance()
        if paused := self.pool.take_paused():
            with self._lock:
                self._queue[:0] = paused
        self._prefill()
        self._decode()
        for sequence in sequences:
            sequence.count(self._totals)

    def _prefill(self) -> None:
        """Reads the next chunk of the prompt whose turn it is."""
        runners = self.pool.runners.values()
        decoding = [one for runner in runners for one in runner.decoding()]
        owners = {one: runner for runner in runners for one in runner.candidates()}
        if not owners:
            return
        started = time.perf_counter()
        chosen = self._group.broadcast(lambda: self._scheduler.choose(list(owners), decoding))
        if chosen is not None:
            self._synchronize()
            read, passes = owners[chosen].prefill(chosen, total=len(self.pool.sequences()))
            self._totals.prefill_passes += passes
            self._scheduler.prefilled(chosen, read, time.perf_counter() - started, decoding)

    def _decode(self) -> None:
        """Adds a token to each answer."""
        started, runners = time.perf_counter(), self.pool.runners.values()
        alone = len(self.pool.sequences()) == 1 and all(map(self.pool.puts_off, self._queue))
        for runner in runners:
            if len(runners) > 1 or runner.decode_batch.groups > 1:
                self._synchronize()
            runner.decode(alone)
        self._scheduler.decoded(time.perf_counter() - started)

    def _synchronize(self) -> None:
        """Waits for the tokens that are being computed, before anything else is computed: MLX
        reports an asynchronous failure to whoever computes next, and leaves the requests whose
        tokens failed with wrong ones."""
        import mlx.core as mx

        try:
            mx.synchronize()
        except Exception as error:
            for runner in self.pool.runners.values():
                if runner.decoding():
                    runner.isolate_failed_batch(error)

    def _admit(self, waiting: list[Sequence]) -> list[Sequence]:
        """Lets requests in, one after the other, until one has to wait for memory; then all behind
        it wait, too. Returns those that are in."""
        admitted: list[Sequence] = []
        if self._group.rank:
            self._queue = waiting.copy()
        for sequence in self._scheduler.admission_order(waiting, self.pool.sequences()):
            try:
                if self.pool.puts_off(sequence, self.pool.PUT_OFF):
                    continue
                priority = sequence.request.priority
                runner = self._open(sequence.model, sequence.renderer, priority)
                if runner is None or not self.pool.fits(runner, sequence):
                    break
            except EngineError as error:
                self._leave_queue(sequence)
                self._totals.endings[type(error).__name__] += 1
                sequence.fail(error)
                continue
            self._leave_queue(sequence)
            self._synchronize()
            runner.admit(sequence)
            self._scheduler.admitted(sequence)
            admitted.append(sequence)
        return admitted

    def _leave_queue(self, sequence: Sequence) -> None:
        with self._lock:
            self._queue.remove(sequence)

    def _tidy(self) -> None:
        """Unloads what is due and not in use; measures, or writes to disk, when nobody waits."""
        with self._lock:
            wanted = {name for name, _ in self._unloads}
        self.pool.unload_due(wanted)
        idle = not self._queue and not self.pool.sequences()
        self.pool.use_pause(idle, self._synchronize)
        with self._lock:
            for name, done in self._unloads:
                if name not in self.pool.runners:
                    done.set()
            self._unloads = [one for one in self._unloads if one[0] in self.pool.runners]
            self._lock.notify_all()  # for `drain`

    # -- the MLX thread's end

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
            sequences, self._queue = [*self._queue, *self.pool.sequences()], []
            self._lock.notify_all()
        for sequence in sequences:
            sequence.fail(EngineClosed(self._broken or "the server is shutting down"))
        if self._disk_cache is not None and not self._broken:
            self._last_writes()
        for _, done in self._unloads:
            done.set()
        if self._ready and not self._group.lost:  # a torn connection would hold MLX for ever
            import mlx.core as mx

            self.pool.forget()
            mx.clear_streams()  # their threads must not outlive this one

    def _last_writes(self) -> None:
        """Files what the running requests have computed and writes what there is time for."""
        until = time.monotonic() + self.LAST_WRITES
        try:
            for runner in self.pool.runners.values():
                runner.file_states()
                while runner.has_unwritten() and time.monotonic() < until:
                    runner.write()
        except Exception:
            log.error("the prefix cache could not be written", exc_info=True)
