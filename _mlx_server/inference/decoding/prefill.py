"""Reading prompts, a chunk at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
import time

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.cache.layers import can_merge, merge_caches, own_buffers
from _mlx_server.inference.cache.prefix_cache import CacheEntry, Match, PrefixCache
from _mlx_server.inference.cache.prefix_tree import common_prefix
from _mlx_server.inference.decoding.decode_batch import DecodeBatch
from _mlx_server.inference.decoding.embedding import Pooler
from _mlx_server.inference.decoding.row_group import read_rows
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from _mlx_server.inference.images.vision import Vision
from _mlx_server.inference.protocol import Embedding, Priority
from _mlx_server.inference.sequence import Sequence

log = logging.getLogger("mlx_server")


class PromptReader:
    """Reads the prompts of a model's requests, a chunk at a time, since checkpoints have to be
    taken inside a prompt and other requests get their turn between two chunks. On the MLX thread.

    Policy. A forward pass reads the weights, however few tokens it takes. So the request whose
    turn it is takes others along that are not less important and have about as much to read up to
    their next checkpoint; with the padding they are at most a chunk, a large one with experts.
    Copying their states into shared caches and back must cost less than it saves (`_pays_off`). A
    request that can have a chunk or more from another waits for that. The end of a prompt, up to
    `TAIL` tokens, is read by the pass that picks the first token of the answer, as far as that is
    quicker than a pass of its own (`_tail_length`)."""

    CHUNK = 512  # tokens; larger ones gain no speed but memory peaks and waiting time
    # With experts a chunk reads the weights of all of them, and larger ones gain up to a fifth:
    # https://github.com/ml-explore/mlx-lm/pull/406
    LARGE = 2048
    LEAST = 64  # tokens that a chunk has at least
    # Tokens up to which a large chunk's attention takes no more memory than a small one's at 64k.
    # Behind more, chunks of low priority are smaller, so that none takes longer than one here
    DEEP = 16384
    SPARSE = 4096  # tokens between two restore points inside a long prompt
    ROWS = 16  # requests that are read together
    # Tokens that a restore point has to save: fewer are read again in less time than the pass takes
    # that ends there, most of which is reading the weights.
    WORTH = 64
    TAIL = 64  # tokens of a prompt's end that the first pass of decoding reads
    PROGRESS = 4.0  # seconds between two log lines on the progress of a long prompt

    def __init__(
        self,
        name: str,
        fingerprint: str,
        weights: Weights,
        vision: Vision | None,
        prefixes: PrefixCache,
        disk_cache: DiskCache | None,
        decode_batch: DecodeBatch,
        group: Group,
    ):
        """`name` is the model's in the log."""
        self._name, self._fingerprint = name, fingerprint
        self._weights, self._vision = weights, vision
        self._prefixes, self._disk_cache, self._decode_batch = prefixes, disk_cache, decode_batch
        self._layers = len(weights.new_cache())
        self._chunk = self.CHUNK
        # With other processes waiting in a collective, no chunk may take long.
        self._chunk_alone = self.LARGE if weights.has_experts and group.size == 1 else 0

    def halve(self) -> None:
        """Makes chunks smaller, after one that took too long or had no room."""
        self._chunk, self._chunk_alone = max(self._chunk // 2, self.LEAST), 0

    def restore(self, sequence: Sequence, running: tuple[Sequence, ...]) -> None:
        """Gives a request the longest beginning of its prompt that was read before: an entry of the
        prefix cache or the disk cache, or a copy from a running request, so that a twin or a
        sub-agent of that one does not prefill twice. A request that has begun changes over when
        others have come a chunk further."""
        begun = sequence.entry is not None
        if begun and len(running) == 1 or sequence.request.embed:
            return
        have = len(sequence.entry.tokens) + self._chunk if sequence.entry is not None else 0
        entry = self._longest_state(sequence, running, have)
        if entry is None:
            if begun:
                return
            entry = CacheEntry([], self._weights.new_cache())
        prompt = sequence.prompt
        entry.model, entry.owner = self._fingerprint, sequence.request.owner
        entry.priority = sequence.request.priority
        entry.root, entry.written = prompt.root, False
        if len(entry.tokens) - _last_checkpoint(entry) >= self.WORTH:
            entry.add_checkpoint()  # before it moves on: this one costs no pass
        if prompt.body and sequence.request.messages[-1]["role"] == "user":
            entry.turns = [at for at in entry.turns if at < prompt.body] + [prompt.body]
        if sequence.entry is not None:
            sequence.usage.cached_tokens += len(entry.tokens) - len(sequence.entry.tokens)
        elif not sequence.usage.prefill_seconds:  # otherwise it finds what it has read itself
            sequence.usage.cached_tokens = len(entry.tokens)
        sequence.entry = entry

    def _longest_state(
        self, sequence: Sequence, running: tuple[Sequence, ...], have: int
    ) -> CacheEntry | None:
        """The longest state that a request can go on from, if it is longer than `have` tokens."""
        tokens, owner, entry = sequence.prompt.tokens, sequence.request.owner, None
        match = self._find(sequence)
        cached = match.length
        shared, donor = _most_like(sequence, running)
        if donor is not None and shared > max(cached, have):
            state = self._state_of(donor)
            usable = state.restorable(min(shared, len(tokens) - 1))
            entry = state.branch(usable) if usable > max(cached, have) else None
        if self._disk_cache is not None and sequence.entry is None:
            chain, kept = self._disk_cache.find(self._fingerprint, tokens[:-1], owner)
            if kept > max(cached, len(entry.tokens) if entry else 0):
                entry = self._disk_cache.load(chain, kept, sequence.request.priority)
        if entry is None and cached > have:
            entry = self._prefixes.take(match)
            sequence.searched = self._prefixes.version
        return entry

    def _find(self, sequence: Sequence) -> Match:
        """What the prefix cache has of a request's prompt. A request that has begun does not search
        once more among the same entries."""
        if sequence.entry is not None and sequence.searched == self._prefixes.version:
            return Match(None, 0, [], 0)
        sequence.searched = self._prefixes.version
        tokens, owner = sequence.prompt.tokens, sequence.request.owner
        return self._prefixes.find(self._fingerprint, tokens, owner)

    def _state_of(self, sequence: Sequence) -> CacheEntry:
        """The state of a running request, which goes on using it."""
        assert sequence.entry is not None
        if not sequence.decoding:
            return sequence.entry
        tokens, cache = self._decode_batch.peek(sequence.number)
        tokens = sequence.tokens_read(tokens)
        return dataclasses.replace(sequence.entry, tokens=tokens, cache=cache)

    def together(
        self, waiting: list[Sequence], running: tuple[Sequence, ...], total: int, room: int
    ) -> dict[Sequence, int]:
        """Which of the waiting requests are read in the next pass, and up to which length each. The
        first of them is one. `running` are the model's requests, `total` counts those of all
        models. Copies of states may take `room` bytes."""
        if self._chunk_alone and not self.is_ready(waiting[0]):
            rows = self._rows(waiting, running, self._chunk_alone, room)
            lengths = [stop - self._start(one) for one, stop in rows.items()]
            short = len(rows) > 1 and max(lengths) <= self._chunk
            shallow = all(self._start(one) < self.DEEP for one in rows)
            if shallow and (short or len(rows) == total):  # nobody else waits meanwhile
                return rows
        chunk = self._chunk_of(waiting[0], self._start(waiting[0]))
        return self._rows(waiting, running, chunk, room)

    def _chunk_of(self, sequence: Sequence, start: int) -> int:
        """Tokens of a request's chunk behind `start`. At depth a chunk takes as long as its
        attention, which grows with both, and more important requests that come wait for its end.
        The others keep theirs: where a pass reads many weights, smaller ones take longer
        together."""
        if sequence.request.priority is not Priority.LOW:
            return self._chunk
        fewer = self._chunk * self.DEEP // max(start, self.DEEP)
        return max(self.LEAST, fewer // self.LEAST * self.LEAST)

    def _rows(
        self, waiting: list[Sequence], running: tuple[Sequence, ...], most: int, room: int
    ) -> dict[Sequence, int]:
        """As `together`, for a pass of at most so many tokens."""
        chosen, others = waiting[0], waiting[1:]
        ready = self.is_ready(chosen)
        rows = {chosen: self._stop(chosen, most)}
        width = rows[chosen] - self._start(chosen)
        if not self._may_share(chosen):
            return rows
        for other in others:
            if (len(rows) + 1) * width > most:
                break
            if not self._may_share(other) or self._waits_for(other, rows):
                continue
            self.restore(other, running)
            more = {**rows, other: self._stop(other, most)}
            wide = max(width, more[other] - self._start(other))
            if wide > 2 * max(width, self.LEAST) or wide * len(more) > most:
                continue
            if self.is_ready(other) == ready and self._fits(more, room):
                rows, width = more, wide
        # Those that are ready share caches from now on in any case.
        return rows if ready or self._pays_off(list(rows.values())) else {chosen: rows[chosen]}

    def _may_share(self, sequence: Sequence) -> bool:
        """Whether a request can be read together with others at all."""
        if sequence.alone or sequence.request.embed or sequence.prompt.images:
            return False
        return sequence.entry is None or can_merge(sequence.entry.cache)

    def _waits_for(self, sequence: Sequence, rows: dict[Sequence, int]) -> bool:
        """Whether a request is better off with a copy of what one of these is about to read."""
        for one in rows:
            shared = _shared(one, sequence)
            changes_over = shared > self._start(sequence) + self._chunk
            if changes_over and shared > self._start(one) + self.LEAST:
                return True
        return False

    def _fits(self, rows: dict[Sequence, int], room: int) -> bool:
        """Whether there is room for copies of these states, which have to be of like length."""
        stops = list(rows.values())
        return self._copies(stops) <= room and self._decode_batch.alike(stops, room)

    def _pays_off(self, stops: list[int]) -> bool:
        """Whether reading requests up to these lengths together costs fewer bytes than reading one
        after the other: copying reads and writes each state twice, and each request but one would
        read the weights once more."""
        saved: int = (len(stops) - 1) * max(self._weights.size, DecodeBatch.LEAST)
        return 2 * self._copies(stops) <= saved

    def _copies(self, stops: list[int]) -> int:
        """Bytes of shared caches for states of these lengths, and of the copies back."""
        return 2 * len(stops) * self._weights.state_size.nbytes(max(stops))

    def _start(self, sequence: Sequence) -> int:
        return len(sequence.entry.tokens) if sequence.entry is not None else 0

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the first pass of decoding reads all that is left of a prompt."""
        prompt, start = sequence.prompt, self._start(sequence)
        left = len(prompt.tokens) - start
        if left <= 1:
            return True
        most = min(self._tail_length(), self._chunk)
        if left > most or sequence.limit <= 0 or self._marks(sequence):
            return False
        return not prompt.images or prompt.images[-1].end <= start

    def _tail_length(self) -> int:
        """How many tokens of a prompt's end the first pass of decoding reads, `TAIL` if it is not
        known what passes cost. A pass of which only the states are wanted leaves out what comes
        behind the last layer's keys and values, since MLX computes nothing that is not used: about
        a layer's work for each token. So much a further pass may cost, most of which is reading the
        weights; where they are read fast, as by a CPU, it is less than that for a few tokens
        already."""
        speculation = self._decode_batch.speculation
        if speculation is None or not speculation.costs.known:
            return self.TAIL
        return int(min(self.TAIL, self._layers * speculation.costs.tokens_in_a_pass))

    def _marks(self, sequence: Sequence) -> list[int]:
        """The lengths ahead at which a request gets a checkpoint: a pass ends there. From the last
        one another answer to the same prompt goes on, from the root other conversations do."""
        entry, prompt = sequence.entry, sequence.prompt
        if entry is None or entry.trimmable:
            return []
        start, last = len(entry.tokens), prompt.body or len(prompt.tokens) - 1
        before = _last_checkpoint(entry)
        marks: list[int] = []
        for at in sorted({prompt.root, prompt.turn}):
            if start < at < last and at - max([before, *marks]) >= self.WORTH:
                marks.append(at)
        sparse = (start // self.SPARSE + 1) * self.SPARSE
        if sparse < last and min(abs(sparse - at) for at in (before, last, *marks)) >= self.WORTH:
            marks.append(sparse)
        return sorted([*marks, last]) if last > start else []

    def _stop(self, sequence: Sequence, most: int) -> int:
        """Up to which length a request is read next: where a checkpoint belongs, or at most so many
        tokens; its whole length if it is ready to decode."""
        start, total = self._start(sequence), len(sequence.prompt.tokens)
        if self.is_ready(sequence):
            return total
        return min([*self._marks(sequence), total - 1, start + most])

    def read(self, rows: dict[Sequence, int]) -> None:
        """Reads these requests up to these lengths, in one pass. If it fails, those of several keep
        the states that they had."""
        import mlx.core as mx

        due = {one: min(self._marks(one), default=math.inf) for one in rows}
        if len(rows) == 1:
            rows = {one: self._read_row(one, stop) for one, stop in rows.items()}
        else:
            self._read_rows(rows)
        mx.clear_cache()
        for sequence, stop in rows.items():
            entry, prompt = sequence.entry, sequence.prompt
            assert entry is not None
            sequence.usage.prefilled_tokens += stop - len(entry.tokens)
            entry.tokens = prompt.tokens[:stop]
            if stop >= due[sequence]:
                entry.add_checkpoint()
            self._log_progress(sequence)

    def _read_row(self, sequence: Sequence, stop: int) -> int:
        """Reads one request up to a length; with images it may be another one. Returns it."""
        import mlx.core as mx

        entry, prompt = sequence.entry, sequence.prompt
        assert entry is not None
        start = len(entry.tokens)
        if self._vision is not None and prompt.images:
            before = self._vision.runs
            stop = self._vision.reach(prompt, start, stop)
            sequence.usage.images_read += self._vision.runs - before
            self._vision.read(prompt, start, stop, entry.cache)
        else:
            self._weights.model(mx.array(prompt.tokens[start:stop])[None], cache=entry.cache)
        mx.eval([layer.state for layer in entry.cache])
        return stop

    def _read_rows(self, rows: dict[Sequence, int]) -> None:
        """Reads several requests in shared caches."""
        import mlx.core as mx

        entries = [sequence.entry for sequence in rows if sequence.entry is not None]
        parts = [one.prompt.tokens[self._start(one) : stop] for one, stop in rows.items()]
        shared = merge_caches([entry.cache for entry in entries])
        read_rows(self._weights.model, parts, shared)
        mx.eval([layer.state for layer in shared])
        caches = [[own_buffers(layer.extract(at)) for layer in shared] for at in range(len(rows))]
        mx.eval([layer.state for cache in caches for layer in cache])
        for entry, cache in zip(entries, caches, strict=True):
            entry.cache = cache

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
            self._name,
            100 * done // total,
            f"{done:,}",
            f"{total:,}",
            speed,
            sequence.left / speed,
        )

    def embed(self, sequence: Sequence) -> bool:
        """Reads a chunk of a text to embed; behind the last one the caller gets its vector, and it
        is True that all was read. The prefix cache has no part in it."""
        import mlx.core as mx

        pooler = sequence.pooler
        if pooler is None:
            cache = self._weights.new_cache()
            pooler = Pooler(self._weights.pooling or "mean", sequence.prompt_tokens, cache)
            sequence.pooler = pooler
        chunk = self._chunk_of(sequence, pooler.length)
        stop = pooler.length + chunk if sequence.left > chunk else None
        tokens = sequence.prompt.tokens[pooler.length : stop]
        pooler.add(self._weights.body(mx.array(tokens)[None], cache=pooler.cache)[0])
        mx.clear_cache()
        sequence.usage.prefilled_tokens += len(tokens)
        if sequence.left >= 0:
            return False
        sequence.emit(Embedding(pooler.vector()))
        sequence.pooler = None
        return True

    def salvage(self, sequence: Sequence) -> None:
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
            self._prefixes.put(entry)
        except Exception:
            log.info("nothing of the failed prompt could be kept", exc_info=True)


def _last_checkpoint(entry: CacheEntry) -> int:
    """The longest prefix of an entry that it can give when it has moved on."""
    length = len(entry.tokens)
    return length if length in entry.checkpoints else entry.restorable(length - 1)


def _shared(one: Sequence, other: Sequence) -> int:
    """How many tokens of their prompts two requests may read once: none with different owners."""
    if one.request.owner != other.request.owner:
        return 0
    return common_prefix(one.prompt.tokens, other.prompt.tokens)


def _most_like(sequence: Sequence, running: tuple[Sequence, ...]) -> tuple[int, Sequence | None]:
    """The running request of the same owner that has read the most of a request's prompt, and how
    much that is."""
    most, donor = 0, None
    for other in running:
        if other is sequence or other.entry is None:
            continue
        shared = _shared(other, sequence)
        if not other.decoding:
            shared = min(shared, len(other.entry.tokens))
        if shared > most:
            most, donor = shared, other
    return most, donor
