"""A model's weights and its running requests."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.cache.prefix_cache import PrefixCache
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.catalog.mtp_files import Identity
from _mlx_server.inference.decoding.decode_batch import DecodeBatch, Row
from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.decoding.sampling import make_penalties, make_sampler, token_logprobs
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from _mlx_server.inference.images.vision import ImageRows, Vision
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.protocol import EngineError, InvalidRequest, Priority
from _mlx_server.inference.sequence import Sequence, State
from _mlx_server.inference.speculation.head_drafter import HeadDrafter

log = logging.getLogger("mlx_server")


class ModelRunner:
    """A model's weights and its running requests. Every method runs on the MLX thread; other
    threads may read `sequences`, `used` and `keep_alive`, which are replaced as a whole.

    The `PromptReader` reads the prompts, the decode batch then takes over. A failure fails the
    request it belongs to and no other."""

    # Requests that decode side by side, lower priorities not counted; memory bounds them earlier
    ROWS = 256
    # Tokens of an answer to keep memory free for; a longer one may have to wait in between
    EXPECTED = 4096
    INSPECTED = 32  # tokens between two checks that the model still computes numbers

    def __init__(
        self,
        local: LocalModel,
        renderer: PromptRenderer,
        prefixes: PrefixCache,
        kv_bits: int | None,
        disk_cache: DiskCache | None,
        group: Group,
        room: Callable[[], int],
        speculates: bool = False,
    ):
        """Loads the model. `room` tells how many bytes there are beside the weights and what
        running requests are expected to need. Raises ModelLoadError."""
        started = time.perf_counter()
        log.info("loading %s, %s", local.name, gigabytes(local.size))
        self.local, self.renderer, self.prefixes = local, renderer, prefixes
        identity = Identity.of(local, kv_bits, speculates)
        self.fingerprint = identity.fingerprint
        self.weights = Weights(local, kv_bits, group, identity.head)
        self.model = self.weights.model
        self.size: int = self.weights.size
        self.vision: Vision | None = None
        if renderer.image_layout is not None:
            self.vision = Vision(local, self.model, renderer.image_layout)
            self.size += self.vision.size
        self.state_size = self.weights.state_size
        self.sequences: tuple[Sequence, ...] = ()
        self.keep_alive: float | None = None  # seconds that the idle model stays
        self.used = time.monotonic()
        # When the latest request of each priority has ended, in monotonic seconds
        self.uses: dict[Priority, float] = {}
        self.ended = False  # whether one has ended since a pass was measured
        self._disk_cache, self._group, self._room = disk_cache, group, room
        ends = renderer.tokenizer.eos_token_ids
        images = ImageRows(self.vision) if self.vision else None
        self.speculation = self.weights.speculation(ends) if speculates else None
        self.decode_batch = DecodeBatch(
            self.model, ends, self.size, self.state_size, group, images, self.speculation
        )
        self._reader = PromptReader(
            local.name,
            self.fingerprint,
            self.weights,
            self.vision,
            prefixes,
            disk_cache,
            self.decode_batch,
            group,
        )
        log.info("loaded %s in %.1f s", local.name, time.perf_counter() - started)

    @property
    def expires(self) -> float | None:
        """When an idle model is unloaded, in monotonic seconds; None for never."""
        if self.keep_alive is None or self.keep_alive < 0:
            return None
        return (time.monotonic() if self.sequences else self.used) + self.keep_alive

    @property
    def committed(self) -> int:
        """Bytes of the weights, and of what the running requests are expected to need."""
        states = sum(map(self.reserve, self.sequences))
        return self.size + states + self.decode_batch.padding

    def reserve(self, sequence: Sequence) -> int:
        """Bytes of KV to expect of a request."""
        answer = max(sequence.usage.completion_tokens, min(sequence.limit, self.EXPECTED))
        tower = self.vision.reserve(sequence.prompt) if self.vision else 0
        return self.state_size.nbytes(sequence.prompt_tokens, answer) + tower

    @property
    def held(self) -> int:
        """Bytes of KV that its requests have."""
        lengths = [one.length for one in self.sequences]
        return sum(self.state_size.nbytes(length) for length in lengths if length)

    def admit(self, sequence: Sequence) -> None:
        """Takes a request in, with the state that it goes on from, before room is made for it by
        dropping states."""
        if sequence.request.keep_alive is not None:
            self.keep_alive = sequence.request.keep_alive
        waited = sequence.lap()
        self.sequences = (*self.sequences, sequence)
        if not sequence.prompt.tokens:
            return self._end(sequence, "load")
        if sequence.detokenizer is None:  # otherwise it was paused
            sequence.usage.load_seconds = waited
            sequence.detokenizer = self.renderer.tokenizer.detokenizer
            sequence.parser.feed(sequence.prompt.opening, markup=True)
            if self.weights.has_head and sequence.drafters:
                sequence.drafters.append(HeadDrafter(self.model))
        try:
            self._reader.restore(sequence, self.sequences)
        except Exception as error:
            self._after_failure(error)
            self._drop(sequence, error)

    def decoding(self) -> list[Sequence]:
        """The requests in the decode batch."""
        return [sequence for sequence in self.sequences if sequence.decoding]

    def candidates(self) -> list[Sequence]:
        """The requests that can use a chunk of prefill, or begin to decode. The bound of the batch
        counts requests of the same or a higher priority: none waits for the end of a lower one."""
        rows = [one.request.priority for one in self.decoding()]
        served = [p for p in Priority if sum(row <= p for row in rows) < self.ROWS]
        waiting = [one for one in self.sequences if one.state in (State.WAITING, State.PREFILL)]
        return [one for one in waiting if one.request.priority in served]

    # -- prefill

    def prefill(self, sequence: Sequence, total: int) -> tuple[list[Sequence], int]:
        """Reads one chunk of a request's prompt, and of others that fit into the same pass; returns
        those of which something was read, and how many passes it took. `total` counts the requests
        of all models. Behind its last chunk a request begins to decode."""
        read, passes, rows = [], 0, [sequence]
        try:
            sequence.enter(State.PREFILL)
            if sequence.request.embed:
                if self._reader.embed(sequence):
                    sequence.usage.prefill_seconds += sequence.lap()
                    self._end(sequence, "stop")
                return rows, 1
            self._reader.restore(sequence, self.sequences)
            stops = self._reader.together(
                self._companions(sequence), self.sequences, total, self._room()
            )
            rows = list(stops)
            for one in rows:
                one.enter(State.PREFILL)
            if not self._reader.is_ready(sequence):
                self._reader.read(stops)
                read, passes = rows, 1
            rows = [one for one in rows if self._reader.is_ready(one)]
            if self._start_decoding(rows):
                read, passes = read or rows, passes + 1
        except Exception as error:
            self._prefill_failed(rows, error)
        return read, passes

    def _companions(self, sequence: Sequence) -> list[Sequence]:
        """A request whose turn it is and those that may be read with it, which may all decode
        afterwards."""
        priority = sequence.request.priority
        taken = sum(one.request.priority <= priority for one in self.decoding())
        others = [one for one in self.candidates() if one.request.priority <= priority]
        others = [one for one in others if one is not sequence]
        return [sequence, *others][: min(self._reader.ROWS, self.ROWS - taken)]

    def _prefill_failed(self, rows: list[Sequence], error: Exception) -> None:
        """A pass has failed. It cannot be told which of several requests was the cause: each of
        them goes on alone, where only the one that causes the failure fails again."""
        self._after_failure(error)
        if len(rows) > 1:
            log.warning("reading %d prompts together failed: they part", len(rows), exc_info=error)
            for one in rows:
                one.alone = True
            return
        if _on_gpu(error):  # it took too long, or had no room: smaller chunks may do
            self._reader.halve()
        else:
            self._reader.salvage(rows[0])
        self._drop(rows[0], error)

    def _start_decoding(self, sequences: list[Sequence]) -> bool:
        """The requests have read their prompts, or all but a few tokens, which are read now.
        Returns whether there were any besides the last one of each."""
        for sequence in sequences:
            if sequence.limit <= 0:
                sequence.usage.prefill_seconds += sequence.lap()
                self._end(sequence, "length")
        starting = [one for one in sequences if one.limit > 0]
        if not starting:
            return False
        room = None if starting[0].alone else self._room()
        numbers = self.decode_batch.insert([self._row(one) for one in starting], room)
        read = sum(one.left for one in starting)
        for sequence, number in zip(starting, numbers, strict=True):
            assert sequence.entry is not None
            sequence.number = number
            sequence.usage.prefilled_tokens += sequence.left
            sequence.usage.prefill_seconds += sequence.lap()
            sequence.entry.tokens = sequence.prompt.tokens[:-1]
            sequence.entry.cache = []  # the batch returns it at the end
            sequence.enter(State.DECODE)
        return read > 0

    def _row(self, sequence: Sequence) -> Row:
        """What the decode batch needs of a request."""
        request, prompt, entry = sequence.request, sequence.prompt, sequence.entry
        assert entry is not None
        vocabulary = len(self.renderer.tokenizer)
        sequence.sampler = sequence.sampler or make_sampler(request.sampling, vocabulary)
        processors: list[Any] = make_penalties(request.sampling)
        if sequence.grammar is not None:
            written = prompt.tokens[sequence.prompt_tokens :]
            sequence.constraint = sequence.grammar.after(written)
            processors.append(sequence.constraint)
        if budget := self.renderer.budget(request, prompt, sequence.prompt_tokens):
            processors.append(budget)
        left = sequence.limit - sequence.usage.completion_tokens
        shift = self.vision.shift(prompt, len(prompt.tokens)) if self.vision else 0
        return Row(entry, prompt.tokens, left, sequence.sampler, processors, shift)

    # -- decode

    def decode(self, alone: bool) -> None:
        """One token for each request of a group of those that decode; several for one that is
        `alone` in the engine, if drafts of them are right."""
        by_number = {sequence.number: sequence for sequence in self.decoding()}
        if not by_number:
            return
        only = next(iter(by_number.values()))
        try:
            responses = self.decode_batch.step(only.drafters if alone and not only.alone else ())
        except Exception as error:
            return self.isolate_failed_batch(error)
        for number in {response.uid for response in responses}:
            by_number[number].usage.decode_passes += 1
        for response in responses:
            sequence = by_number[response.uid]
            if not sequence.decoding:  # it has ended before the last of its tokens
                continue
            self.decode_batch.take()
            if not self._take(sequence, response):
                return
        self.decode_batch.settle()

    def _take(self, sequence: Sequence, response: Any) -> bool:
        """Takes a token that was picked; if that fails, so does the request. Returns False where a
        failure of the whole batch came to light."""
        try:
            try:
                self._inspect(sequence, response)
            except RuntimeError as error:  # MLX's, of the next step, which is being computed
                self.isolate_failed_batch(error)
                return False
            self._take_token(sequence, response)
        except Exception as error:
            self._after_failure(error)
            self.decode_batch.discard(sequence.number)
            self._drop(sequence, error)
        return True

    def _take_token(self, sequence: Sequence, response: Any) -> None:
        """Turns a token into events; ends the request behind its last token."""
        usage, parser, detokenizer = sequence.usage, sequence.parser, sequence.detokenizer
        constraint = sequence.constraint
        if constraint is not None and constraint.observe(response.token, usage.completion_tokens):
            parser.verbatim()
        usage.completion_tokens += 1
        usage.thinking_tokens += parser.state == "thinking"
        if response.finish_reason != "stop":
            detokenizer.add_token(response.token)
        if response.finish_reason:
            detokenizer.finalize()
        piece = detokenizer.last_segment
        sequence.raw += piece
        sequence.emit(*sequence.parse(piece, response.token))
        if response.finish_reason:
            assert sequence.entry is not None
            sequence.entry.tokens = sequence.tokens_read(response.all_tokens)
            sequence.entry.cache = response.prompt_cache
            if response.finish_reason != "stop" or not self._end_thinking(sequence):
                self._end(sequence, response.finish_reason)
        elif parser.stop_sequence is not None or parser.finished:
            self._end(sequence, "stop")

    def _end_thinking(self, sequence: Sequence) -> bool:
        """Ends the thinking of a turn that the model has ended inside of it, once, so that the
        answer is written; returns whether it goes on."""
        tags = self.renderer.format.thinking
        left = sequence.limit - sequence.usage.completion_tokens
        if (
            tags is None
            or sequence.parser.state != "thinking"
            or sequence.thinking_ended
            or left <= 0
        ):
            return False
        log.info("%s ended its turn inside its thinking: the answer is asked for", self.local.name)
        sequence.thinking_ended = True
        entry, end = sequence.entry, f"{tags[1]}\n\n"
        assert entry is not None
        written = entry.tokens
        if written and written[-1] in self.renderer.tokenizer.eos_token_ids:
            written = written[:-1]
        sequence.detokenizer = self.renderer.tokenizer.detokenizer
        sequence.raw += end
        sequence.emit(*sequence.parser.feed(end, markup=True))
        self._begin_again(sequence, [*written, *self.renderer.encode(end)])
        self.prefixes.put(entry)
        return True

    def _inspect(self, sequence: Sequence, response: Any) -> None:
        """Checks now and then that the model still computes numbers, and notes a token's log
        probabilities. Raises ArithmeticError if it does not: every sampler picks token 0 then, and
        a state that was spoiled once never recovers."""
        import mlx.core as mx

        top = None if response.finish_reason == "stop" else sequence.request.logprobs
        due = response.token == 0 or sequence.usage.completion_tokens % self.INSPECTED == 0
        if not due and top is None:
            return
        with mx.stream(mx.cpu):  # on the GPU it would have to wait for the next step
            if due and math.isnan(response.logprobs[0].item()):
                raise ArithmeticError("the model's output is not a number")
            if top is not None:
                token_bytes = self.renderer.token_bytes
                sequence.add_logprobs(
                    token_logprobs(response.token, response.logprobs, top, token_bytes)
                )

    def _reclaim(self, sequence: Sequence) -> None:
        """Takes a request's state back from the decode batch."""
        assert sequence.entry is not None
        tokens, cache = self.decode_batch.remove(sequence.number)
        sequence.entry.tokens, sequence.entry.cache = sequence.tokens_read(tokens), cache

    def isolate_failed_batch(self, error: Exception) -> None:
        """A step of a group has failed, and it cannot be told which of its requests was the cause:
        each of them reads what it had once more and goes on in a group of its own, where only the
        one that causes the failure fails again. Requests of other groups just go on."""
        self._after_failure(error)
        drafting, read = self.decode_batch.drafting, self.decode_batch.drop_failed()
        sequences = [one for one in self.decoding() if one.number in read]
        if len(sequences) > 1:
            count = len(sequences)
            log.warning("a step of %d requests failed: they part", count, exc_info=error)
        for sequence in sequences:
            tokens = read[sequence.number]
            # It is the cause, unless a draft was, or it has ended meanwhile. One that has ended and
            # is not here any more may have been the cause as well.
            if len(read) == 1 and not drafting or tokens is None:
                self._drop(sequence, error)
                continue
            written = sequence.prompt_tokens + sequence.usage.completion_tokens
            self._begin_again(sequence, sequence.tokens_read(tokens)[:written])
            sequence.alone = True

    def pause(self, sequence: Sequence) -> bool:
        """Lets a request wait for memory; returns whether it does. Its state goes to the prefix
        cache, from where it goes on later. A request that ends with its next token is not
        paused."""
        tokens = sequence.prompt.tokens
        if sequence.decoding:
            try:
                response = self.decode_batch.upcoming(sequence.number)
            except Exception as error:
                self.isolate_failed_batch(error)
                return False
            if response.token in self.renderer.tokenizer.eos_token_ids:
                return False
            if sequence.usage.completion_tokens + 1 >= sequence.limit:
                return False
            sequence.usage.decode_passes += 1
            # It is picked already, and is not picked again
            if not self._take(sequence, response) or sequence.state is State.ENDED:
                return False
            self._reclaim(sequence)
            assert sequence.entry is not None
            tokens = [*sequence.entry.tokens, response.token]
        entry, sequence.pooler = sequence.entry, None
        self._begin_again(sequence, tokens)
        self._remove(sequence)
        if entry is not None:
            self.prefixes.put(entry)
        return True

    def _begin_again(self, sequence: Sequence, tokens: list[int]) -> None:
        """Sends a request back to the start, to go on behind these tokens later."""
        sequence.prompt = dataclasses.replace(sequence.prompt, tokens=tokens)
        if sequence.decoding:
            sequence.usage.decode_seconds += sequence.lap()
        else:
            sequence.usage.prefill_seconds += sequence.lap()
        sequence.entry, sequence.number = None, 0
        sequence.enter(State.WAITING)

    # -- the end

    def end_cancelled(self, cancelled: list[Sequence]) -> None:
        """Ends those of these requests that are here; what they have computed goes to the prefix
        cache."""
        for sequence in self.sequences:
            if sequence in cancelled:
                self._end(sequence, "stop")

    def file_states(self) -> None:
        """Files what all requests have computed, which have been told that the engine ends."""
        for sequence in self.sequences:
            self._file(sequence)

    def _end(self, sequence: Sequence, reason: str) -> None:
        failure = self._finish_step(sequence) if sequence.decoding else None
        if self.speculation is not None:
            self.speculation.costs.update()
        self._release(sequence)
        if failure is not None:
            sequence.entry = None
            self.isolate_failed_batch(failure)
            self.decode_batch.discard(sequence.number)
        sequence.emit(*sequence.parser.finish(cut=reason == "length"))
        self._file(sequence)
        constraint = sequence.constraint
        if constraint is not None and constraint.error:
            message = f"the output format asks too much: {constraint.error}"
            return sequence.fail(InvalidRequest(message))
        sequence.finish(reason)

    def _finish_step(self, sequence: Sequence) -> Exception | None:
        """Takes back the state of a request that has its last token. The next step has changed that
        already: returns how the step has failed, if it has. The state cannot be kept then, but the
        answer is whole."""
        import mlx.core as mx

        try:
            mx.synchronize()  # first: a failure amid `_reclaim` would leave the batch in disorder
        except RuntimeError as error:
            return error
        finally:
            sequence.usage.decode_seconds += sequence.lap()
        if sequence.number in self.decode_batch:
            self._reclaim(sequence)
        return None

    def _file(self, sequence: Sequence) -> None:
        """Puts a request's state into the prefix cache, and its answer into the renderer's
        memory."""
        entry, in_batch = sequence.entry, sequence.number in self.decode_batch
        if entry is None:
            return
        if in_batch:
            self._reclaim(sequence)
        if in_batch or sequence.decoding:
            if key := self._remember(sequence):
                entry.add_answer(key)
            sequence.tokens = list(entry.tokens)
        self.prefixes.put(entry)
        sequence.entry = None

    def _remember(self, sequence: Sequence) -> str:
        """The key under which the renderer remembers what a request has read and generated."""
        assert sequence.entry is not None
        return self.renderer.remember(
            sequence.request,
            sequence.prompt,
            sequence.entry.tokens,
            sequence.visible,
            sequence.thinking,
            sequence.calls,
        )

    def _after_failure(self, error: Exception) -> None:
        """Comes first after a failure: what was computed at the same time may fail as well, and no
        other request may be told of it."""
        import mlx.core as mx

        self._group.failed(error)
        with contextlib.suppress(Exception):
            mx.synchronize()

    def _drop(self, sequence: Sequence, error: Exception) -> None:
        """Fails one request; its state is not kept."""
        log.error("generation failed", exc_info=error)
        if sequence in self.sequences:
            self._release(sequence)
        sequence.entry = None
        message = "the model failed while generating; the server goes on, please try again"
        sequence.fail(EngineError(message))

    def _release(self, sequence: Sequence) -> None:
        self._remove(sequence)
        self.ended = True
        self.used = self.uses[sequence.request.priority] = time.monotonic()
        if sequence.request.keep_alive is not None:
            self.keep_alive = sequence.request.keep_alive

    def _remove(self, sequence: Sequence) -> None:
        self.sequences = tuple(one for one in self.sequences if one is not sequence)

    # -- when nobody waits

    @property
    def unmeasured(self) -> bool:
        """Whether passes are still to be measured."""
        return self.speculation is not None and self.speculation.unmeasured

    def measure(self) -> None:
        """Measures a pass. If it fails, the model decodes without drafts."""
        import mlx.core as mx

        assert self.speculation is not None
        self.ended = False
        try:
            self.speculation.measure()
        except Exception as error:
            self._after_failure(error)
            name = self.local.name
            log.warning("%s decodes without drafts: measuring has failed", name, exc_info=error)
        if not self.unmeasured:
            mx.clear_cache()

    def has_unwritten(self) -> bool:
        """Whether there is something to write to the disk cache."""
        if self._disk_cache is None:
            return False
        return self.prefixes.unwritten(self.fingerprint) is not None

    def write(self) -> None:
        """Writes one segment of what the disk cache has not got."""
        entry = self.prefixes.unwritten(self.fingerprint)
        if self._disk_cache is None or entry is None:
            return
        sparse = range(PromptReader.SPARSE, len(entry.tokens), PromptReader.SPARSE)
        marks = {entry.root, *entry.checkpoints, *sparse}
        reading = functools.partial(self.renderer.reading, entry.owner)
        entry.written = self._disk_cache.write(self.fingerprint, entry, reading, marks)


def _on_gpu(error: Exception) -> bool:
    """Whether the GPU has failed. What its commands were to write or to move is lost then, the
    states of earlier tokens among it."""
    return str(error).startswith("[METAL]")
