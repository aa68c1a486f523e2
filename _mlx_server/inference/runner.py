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

from _mlx_server.inference.decode_batch import DecodeBatch
from _mlx_server.inference.disk_cache import DiskCache
from _mlx_server.inference.embedding import Pooler
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import gigabytes
from _mlx_server.inference.models import LocalModel, fingerprint
from _mlx_server.inference.prefix_cache import CacheEntry, Match, PrefixCache
from _mlx_server.inference.prefix_tree import common_prefix
from _mlx_server.inference.protocol import Embedding, EngineError, InvalidRequest, Priority
from _mlx_server.inference.renderer import PromptRenderer
from _mlx_server.inference.sampling import make_penalties, make_sampler, token_logprobs
from _mlx_server.inference.sequence import Sequence, State
from _mlx_server.inference.vision import ImageRows, Vision
from _mlx_server.inference.weights import Weights

log = logging.getLogger("mlx_server")


class ModelRunner:
    """A model's weights and its running requests. Every method runs on the MLX thread; other
    threads may read `sequences`, `used` and `keep_alive`, which are replaced as a whole.

    Prefill is done here, a chunk at a time, since checkpoints have to be taken inside it and other
    requests get their turn between two chunks; the decode batch then takes over. A failure fails
    the request it belongs to and no other."""

    CHUNK = 512  # tokens; larger ones gain no speed but memory peaks and waiting time
    # With experts a chunk reads the weights of all of them, and larger ones gain up to a fifth:
    # https://github.com/ml-explore/mlx-lm/pull/406
    LARGE = 2048
    LEAST = 64  # tokens that a chunk has after failures
    # Tokens up to which a large chunk's attention takes no more memory than a small one's at 64k
    DEEP = 16384
    SPARSE = 4096  # tokens between two restore points inside a long prompt
    # Requests that decode side by side, lower priorities not counted; memory bounds them earlier
    ROWS = 256
    # Tokens of an answer to keep memory free for; a longer one may have to wait in between
    EXPECTED = 4096
    INSPECTED = 32  # tokens between two checks that the model still computes numbers
    PROGRESS = 4.0  # seconds between two log lines on the progress of a long prompt

    def __init__(
        self,
        local: LocalModel,
        renderer: PromptRenderer,
        prefixes: PrefixCache,
        kv_bits: int | None,
        disk_cache: DiskCache | None,
        group: Group,
        room: Callable[[], int],
    ):
        """Loads the model. `room` tells how many bytes there are beside the weights and what
        running requests are expected to need. Raises ModelLoadError."""
        started = time.perf_counter()
        log.info("loading %s, %s", local.name, gigabytes(local.size))
        self.local, self.renderer, self.prefixes = local, renderer, prefixes
        self.fingerprint = fingerprint(local, kv_bits)
        self.weights = Weights(local, kv_bits, group)
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
        self._disk_cache, self._group, self._room = disk_cache, group, room
        ends = renderer.tokenizer.eos_token_ids
        images = ImageRows(self.vision) if self.vision else None
        self.decode_batch = DecodeBatch(self.model, ends, self.size, self.state_size, group, images)
        self._chunk = self.CHUNK
        # With other processes waiting in a collective, no chunk may take long.
        self._chunk_alone = self.LARGE if self.weights.has_experts and group.size == 1 else 0
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
        try:
            self._restore(sequence)
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

    def prefill(self, sequence: Sequence, undisturbed: bool) -> None:
        """Reads one chunk of a request's prompt, a large one if no other request waits meanwhile.
        Behind the last chunk the request begins to decode."""
        sequence.enter(State.PREFILL)
        try:
            if sequence.request.embed:
                return self._embed(sequence)
            self._restore(sequence)
            if sequence.left > 0:
                self._read_chunk(sequence, undisturbed)
                self._log_progress(sequence)
            if sequence.left <= 0:
                self._start_decoding(sequence)
        except Exception as error:
            self._after_failure(error)
            if _on_gpu(error):  # it took too long, or had no room: smaller chunks may do
                self._chunk, self._chunk_alone = max(self._chunk // 2, self.LEAST), 0
            else:
                self._salvage(sequence)
            self._drop(sequence, error)

    def _restore(self, sequence: Sequence) -> None:
        """Gives a request the longest beginning of its prompt that was read before: an entry of the
        prefix cache or the disk cache, or a copy from a running request, so that a twin or a
        sub-agent of that one does not prefill twice. A request that has begun changes over when
        others have come a chunk further."""
        begun = sequence.entry is not None
        if begun and len(self.sequences) == 1 or sequence.request.embed:
            return
        have = len(sequence.entry.tokens) + self._chunk if sequence.entry is not None else 0
        entry = self._longest_state(sequence, have)
        if entry is None:
            if begun:
                return
            entry = CacheEntry([], self.weights.new_cache())
        prompt = sequence.prompt
        entry.model, entry.owner = self.fingerprint, sequence.request.owner
        entry.root, entry.written = prompt.root, False
        if prompt.body and sequence.request.messages[-1]["role"] == "user":
            entry.turns = [at for at in entry.turns if at < prompt.body] + [prompt.body]
        if sequence.entry is not None:
            sequence.usage.cached_tokens += len(entry.tokens) - len(sequence.entry.tokens)
        elif not sequence.usage.prefill_seconds:  # otherwise it finds what it has read itself
            sequence.usage.cached_tokens = len(entry.tokens)
        sequence.entry = entry

    def _longest_state(self, sequence: Sequence, have: int) -> CacheEntry | None:
        """The longest state that a request can go on from, if it is longer than `have` tokens."""
        tokens, owner, entry = sequence.prompt.tokens, sequence.request.owner, None
        match = self._find(sequence)
        cached = match.length
        shared, donor = self._most_like(sequence)
        if donor is not None and shared > max(cached, have):
            running = self._state_of(donor)
            usable = running.restorable(min(shared, len(tokens) - 1))
            entry = running.branch(usable) if usable > max(cached, have) else None
        if self._disk_cache is not None and sequence.entry is None:
            chain, kept = self._disk_cache.find(self.fingerprint, tokens[:-1], owner)
            if kept > max(cached, len(entry.tokens) if entry else 0):
                entry = self._disk_cache.load(chain, kept)
        if entry is None and cached > have:
            entry = self.prefixes.take(match)
            sequence.searched = self.prefixes.version
        return entry

    def _find(self, sequence: Sequence) -> Match:
        """What the prefix cache has of a request's prompt. A request that has begun does not search
        once more among the same entries."""
        if sequence.entry is not None and sequence.searched == self.prefixes.version:
            return Match(None, 0, [], 0)
        sequence.searched = self.prefixes.version
        tokens, owner = sequence.prompt.tokens, sequence.request.owner
        return self.prefixes.find(self.fingerprint, tokens, owner)

    def _state_of(self, sequence: Sequence) -> CacheEntry:
        """The state of a running request, which goes on using it."""
        assert sequence.entry is not None
        if not sequence.decoding:
            return sequence.entry
        tokens, cache = self.decode_batch.peek(sequence.number)
        return dataclasses.replace(sequence.entry, tokens=_read(sequence, tokens), cache=cache)

    def _most_like(self, sequence: Sequence) -> tuple[int, Sequence | None]:
        """The running request of the same owner that has read the most of a request's prompt, and
        how much that is."""
        most, donor = 0, None
        for other in self.sequences:
            if other is sequence or other.entry is None:
                continue
            if other.request.owner != sequence.request.owner:
                continue
            shared = common_prefix(other.prompt.tokens, sequence.prompt.tokens)
            if not other.decoding:
                shared = min(shared, len(other.entry.tokens))
            if shared > most:
                most, donor = shared, other
        return most, donor

    def _read_chunk(self, sequence: Sequence, undisturbed: bool) -> None:
        """Reads up to the next length where a checkpoint belongs, or a chunk if that is less."""
        import mlx.core as mx

        entry, prompt = sequence.entry, sequence.prompt
        assert entry is not None
        start, end = len(entry.tokens), len(prompt.tokens) - 1
        sparse = (start // self.SPARSE + 1) * self.SPARSE
        marks = sorted({prompt.root, prompt.turn, prompt.body or end, sparse, end})
        most = max(self._chunk, self._chunk_alone if undisturbed and start < self.DEEP else 0)
        stop = min(next(at for at in marks if at > start), start + most)
        if self.vision is not None and prompt.images:
            stop = self.vision.reach(prompt, start, stop)
            self.vision.read(prompt, start, stop, entry.cache)
        else:
            self.model(mx.array(prompt.tokens[start:stop])[None], cache=entry.cache)
        mx.eval([layer.state for layer in entry.cache])
        mx.clear_cache()
        entry.tokens = prompt.tokens[:stop]
        sequence.usage.prefilled_tokens += stop - start
        if stop in marks and (stop < end or not prompt.body):
            entry.add_checkpoint()

    def _log_progress(self, sequence: Sequence) -> None:
        """Logs, now and then, how far a prompt is."""
        assert sequence.entry is not None
        now, done, total = time.perf_counter(), len(sequence.entry.tokens), sequence.prompt_tokens
        since = max(sequence.lap_start, sequence.progress_logged)
        if now - since < self.PROGRESS or sequence.left <= 0:
            return
        sequence.progress_logged = now
        speed = (done - sequence.usage.cached_tokens) / (now - sequence.lap_start)
        log.info(
            "%s: prompt %d %%, %s/%s tokens, %.0f tokens/s, %.0f s left",
            self.local.name,
            100 * done // total,
            f"{done:,}",
            f"{total:,}",
            speed,
            sequence.left / speed,
        )

    def _embed(self, sequence: Sequence) -> None:
        """Reads a chunk of a text to embed; behind the last one there is its vector. The prefix
        cache has no part in it."""
        import mlx.core as mx

        pooler = sequence.pooler
        if pooler is None:
            cache = self.weights.new_cache()
            pooler = Pooler(self.weights.pooling or "mean", sequence.prompt_tokens, cache)
            sequence.pooler = pooler
        stop = pooler.length + self._chunk if sequence.left > self._chunk else None
        tokens = sequence.prompt.tokens[pooler.length : stop]
        pooler.add(self.weights.body(mx.array(tokens)[None], cache=pooler.cache)[0])
        mx.clear_cache()
        sequence.usage.prefilled_tokens += len(tokens)
        if sequence.left >= 0:
            return
        sequence.emit(Embedding(pooler.vector()))
        sequence.pooler = None
        sequence.usage.prefill_seconds += sequence.lap()
        self._end(sequence, "stop")

    def _start_decoding(self, sequence: Sequence) -> None:
        sequence.usage.prefill_seconds += sequence.lap()
        if sequence.limit <= 0:
            return self._end(sequence, "length")
        request, prompt, entry = sequence.request, sequence.prompt, sequence.entry
        assert entry is not None
        vocabulary = len(self.renderer.tokenizer)
        sampler = sequence.sampler or make_sampler(request.sampling, vocabulary)
        processors: list[Any] = make_penalties(request.sampling)
        if sequence.grammar is not None:
            written = prompt.tokens[sequence.prompt_tokens :]
            sequence.constraint = sequence.grammar.after(written)
            processors.append(sequence.constraint)
        if budget := self.renderer.budget(request, prompt, sequence.prompt_tokens):
            processors.append(budget)
        left = sequence.limit - sequence.usage.completion_tokens
        last, room = prompt.tokens[-1], None if sequence.alone else self._room()
        shift = self.vision.shift(prompt, len(prompt.tokens)) if self.vision else 0
        sequence.number = self.decode_batch.insert(
            entry, last, left, sampler, processors, room, shift
        )
        sequence.sampler = sampler
        entry.cache = []  # the batch returns it at the end
        sequence.enter(State.DECODE)

    def _salvage(self, sequence: Sequence) -> None:
        """Files the chunks that a failed prefill had finished. Its layers may or may not have read
        more than those."""
        import mlx.core as mx

        if sequence.entry is None:
            return
        try:
            done = len(sequence.entry.tokens)
            torn = dataclasses.replace(sequence.entry, tokens=sequence.prompt.tokens[: done + 1])
            entry = torn.branch(torn.restorable(done))
            mx.eval([layer.state for layer in entry.cache])
            self.prefixes.put(entry)
        except Exception:
            log.info("nothing of the failed prompt could be kept", exc_info=True)

    # -- decode

    def decode(self) -> None:
        """One token for each request of a group of those that decode."""
        by_number = {sequence.number: sequence for sequence in self.decoding()}
        if not by_number:
            return
        try:
            responses = self.decode_batch.step()
        except Exception as error:
            return self.isolate_failed_batch(error)
        for response in responses:
            sequence = by_number[response.uid]
            try:
                self._take_token(sequence, response)
            except Exception as error:
                self._after_failure(error)
                self.decode_batch.discard(sequence.number)
                self._drop(sequence, error)
                if _on_gpu(error) and self.decoding():
                    return self.isolate_failed_batch(error)

    def _take_token(self, sequence: Sequence, response: Any) -> None:
        """Turns a token into events; ends the request behind its last token."""
        usage, parser, detokenizer = sequence.usage, sequence.parser, sequence.detokenizer
        self._check_numbers(sequence, response)
        constraint = sequence.constraint
        if constraint is not None and constraint.observe(response.token, usage.completion_tokens):
            parser.verbatim()
        usage.completion_tokens += 1
        usage.decode_passes += 1
        usage.thinking_tokens += parser.state == "thinking"
        if response.finish_reason != "stop":
            detokenizer.add_token(response.token)
            self._note_logprobs(sequence, response)
        if response.finish_reason:
            detokenizer.finalize()
        piece = detokenizer.last_segment
        sequence.raw += piece
        sequence.emit(*sequence.parse(piece, response.token))
        if response.finish_reason:
            assert sequence.entry is not None
            sequence.entry.tokens = _read(sequence, response.all_tokens)
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

    def _check_numbers(self, sequence: Sequence, response: Any) -> None:
        """Raises ArithmeticError when the model has stopped computing numbers. Every sampler picks
        token 0 then, and a state that was spoiled once never recovers."""
        import mlx.core as mx

        if response.token == 0 or sequence.usage.completion_tokens % self.INSPECTED == 0:
            with mx.stream(mx.cpu):  # on the GPU it would have to wait for the next step
                broken = math.isnan(response.logprobs[0].item())
            if broken:
                raise ArithmeticError("the model's output is not a number")

    def _note_logprobs(self, sequence: Sequence, response: Any) -> None:
        import mlx.core as mx

        top = sequence.request.logprobs
        if top is not None:
            token_bytes = self.renderer.token_bytes
            with mx.stream(mx.cpu):
                token = token_logprobs(response.token, response.logprobs, top, token_bytes)
            sequence.add_logprobs(token)

    def _reclaim(self, sequence: Sequence) -> None:
        """Takes a request's state back from the decode batch."""
        assert sequence.entry is not None
        tokens, cache = self.decode_batch.remove(sequence.number)
        sequence.entry.tokens, sequence.entry.cache = _read(sequence, tokens), cache

    def isolate_failed_batch(self, error: Exception) -> None:
        """A step of a group has failed, and it cannot be told which of its requests was the cause:
        each of them reads what it had once more and goes on in a group of its own, where only the
        one that causes the failure fails again. Requests of other groups just go on."""
        self._after_failure(error)
        read = self.decode_batch.drop_failed()
        sequences = [one for one in self.decoding() if one.number in read]
        if len(sequences) > 1:
            count = len(sequences)
            log.warning("a step of %d requests failed: they part", count, exc_info=error)
        for sequence in sequences:
            tokens = read[sequence.number]
            if len(sequences) == 1 or tokens is None:  # it is the cause, or has ended meanwhile
                self._drop(sequence, error)
                continue
            written = sequence.prompt_tokens + sequence.usage.completion_tokens
            self._begin_again(sequence, _read(sequence, tokens)[:written])
            sequence.alone = True

    def pause(self, sequence: Sequence) -> bool:
        """Lets a request wait for memory; returns whether it does. Its state goes to the prefix
        cache, from where it goes on later. A request that ends with its next token is not
        paused."""
        tokens = sequence.prompt.tokens
        if sequence.decoding:
            response = self.decode_batch.upcoming(sequence.number)
            if response.token in self.renderer.tokenizer.eos_token_ids:
                return False
            if sequence.usage.completion_tokens + 1 >= sequence.limit:
                return False
            self._take_token(sequence, response)  # it is picked already, and is not picked again
            if sequence.state is State.ENDED:
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
        import mlx.core as mx

        if sequence.decoding:
            if sequence.number in self.decode_batch:
                self._reclaim(sequence)
            sequence.usage.decode_seconds += sequence.lap()
            # The next step has changed its state already: if that step fails, none is kept.
            mx.synchronize()
        self._release(sequence)
        sequence.emit(*sequence.parser.finish(cut=reason == "length"))
        self._file(sequence)
        constraint = sequence.constraint
        if constraint is not None and constraint.error:
            message = f"the output format asks too much: {constraint.error}"
            return sequence.fail(InvalidRequest(message))
        sequence.finish(reason)

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
        self.used = time.monotonic()
        if sequence.request.keep_alive is not None:
            self.keep_alive = sequence.request.keep_alive

    def _remove(self, sequence: Sequence) -> None:
        self.sequences = tuple(one for one in self.sequences if one is not sequence)

    # -- the disk

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
        sparse = range(self.SPARSE, len(entry.tokens), self.SPARSE)
        marks = {entry.root, *entry.checkpoints, *sparse}
        reading = functools.partial(self.renderer.reading, entry.owner)
        entry.written = self._disk_cache.write(self.fingerprint, entry, reading, marks)


def _read(sequence: Sequence, tokens: list[int]) -> list[int]:
    """The tokens that a request has read in the decode batch, which knows those of images in
    another form."""
    if not sequence.prompt.images:
        return tokens
    known = sequence.prompt.tokens[: len(tokens)]
    return known + tokens[len(known) :]


def _on_gpu(error: Exception) -> bool:
    """Whether the GPU has failed. What its commands were to write or to move is lost then, the
    states of earlier tokens among it."""
    return str(error).startswith("[METAL]")
