"""A model's weights and its running requests."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

from _mlx_server.inference.decode_batch import DecodeBatch
from _mlx_server.inference.disk_cache import DiskCache
from _mlx_server.inference.generation import Generation, Phase
from _mlx_server.inference.group import Group
from _mlx_server.inference.memory import StateSize, gigabytes
from _mlx_server.inference.models import LocalModel, fingerprint, load_error
from _mlx_server.inference.prefix_cache import CacheEntry, PrefixCache, common_prefix
from _mlx_server.inference.protocol import Embedding, EngineError, InvalidRequest
from _mlx_server.inference.renderer import PromptRenderer
from _mlx_server.inference.sampling import make_penalties, make_sampler, token_logprobs
from _mlx_server.inference.weights import headless_classes, model_body, pooling_mode

log = logging.getLogger("mlx_server")


class ModelRunner:
    """A model's weights and its running requests. Every method runs on the MLX thread.

    Prefill is done here, a chunk at a time, since snapshots have to be taken inside it and others
    get their turn between two chunks; the decoder then takes over. Whatever fails, fails for the
    request it belongs to."""

    CHUNK = 512  # tokens; larger ones gain no speed but memory peaks and waiting time
    # But up to a fifth with experts, all of which each chunk reads:
    # https://github.com/ml-explore/mlx-lm/pull/406
    LARGE = 2048
    LEAST = 64  # tokens that a chunk has after failures
    # Tokens up to which a large chunk's attention takes no more memory than a small one's does at
    # 64k
    DEEP = 16384
    SPARSE = 4096  # tokens between two restore points inside a long prompt
    BATCH = 32  # requests that decode side by side
    # Tokens of an answer to keep memory free for; who writes more may have to wait in between
    EXPECTED = 4096
    INSPECTED = 32  # tokens between two looks whether the model still computes numbers
    TELL = 4.0  # seconds between two words on how far a long prompt is

    def __init__(
        self,
        local: LocalModel,
        renderer: PromptRenderer,
        prefixes: PrefixCache,
        kv_bits: int | None,
        disk_cache: DiskCache | None,
        group: Group,
    ):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        started = time.perf_counter()
        log.info("loading %s, %s", local.name, gigabytes(local.size))
        self.local, self.renderer, self.prefixes, self.disk_cache, self._group = (
            local,
            renderer,
            prefixes,
            disk_cache,
            group,
        )
        self.fingerprint, self._kv_bits = fingerprint(local, kv_bits), kv_bits
        try:
            embeds = "embedding" in local.capabilities
            self.model = group.load(
                local.path, **({"get_model_classes": headless_classes} if embeds else {})
            )
            self._body = model_body(self.model)
            self._pooling = pooling_mode(local) if embeds else "mean"
            cache = self._new_cache()
            forward = self._body if embeds else self.model
            # Compiles the kernels, and shows what KV takes
            mx.eval(forward(mx.array([[0]]), cache=cache))
        except Exception as error:
            raise load_error(local, f"model '{local.name}'", error) from error
        size = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        self.size, self.state = group.broadcast(lambda: (size, StateSize.of(cache)))
        experts = any(
            type(module).__name__.endswith("SwitchLinear") for module in self.model.modules()
        )
        # A GPU must not wait long for another
        self._undisturbed = self.LARGE if experts and group.size == 1 else self.CHUNK
        self.load_seconds = time.perf_counter() - started
        self.jobs: list[Generation] = []
        self.keep_alive: float | None = None
        self.used = time.monotonic()
        self._decoder = self._new_decoder()
        log.info("loaded %s in %.1f s", local.name, self.load_seconds)

    def _new_cache(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

        def quantized(layer: Any) -> Any:
            return (
                QuantizedKVCache(64 if head % 64 == 0 else 32, self._kv_bits)
                if type(layer) is KVCache
                else layer
            )

        config = self.local.config.get("text_config") or self.local.config
        head = config.get("head_dim") or config.get("hidden_size", 0) // config.get(
            "num_attention_heads", 1
        )
        cache = make_prompt_cache(self.model)
        return [quantized(layer) for layer in cache] if self._kv_bits and head % 32 == 0 else cache

    def _new_decoder(self) -> DecodeBatch:
        return DecodeBatch(self.model, self.renderer.tokenizer.eos_token_ids, self._group)

    @property
    def expires(self) -> float | None:
        """When an idle model is unloaded, in monotonic seconds; None for never."""
        if self.keep_alive is None or self.keep_alive < 0:
            return None
        return (time.monotonic() if self.jobs else self.used) + self.keep_alive

    def reserve(self, job: Generation) -> int:
        """Bytes of KV to expect of a request."""
        written = job.usage.completion_tokens
        return self.state.nbytes(job.prompt_tokens + max(written, min(job._limit, self.EXPECTED)))

    def admit(self, job: Generation) -> None:
        """Takes a request in, with the state that it goes on from: before room is made for it by
        dropping states."""
        if job.request.keep_alive is not None:
            self.keep_alive = job.request.keep_alive
        waited = job._lap()
        self.jobs.append(job)
        if not job._prompt.tokens:
            return self._end(job, "load")
        if job._detokenizer is None:  # it was not paused
            job.usage.load_seconds = waited
            job._detokenizer = self.renderer.tokenizer.detokenizer
            job._parser.feed(job._prompt.opening)
        try:
            self._restore(job)
        except Exception as error:
            self._failed(error)
            self._drop(job, error)

    def decoding(self) -> list[Generation]:
        return [job for job in self.jobs if job._phase is Phase.DECODE]

    def candidates(self) -> list[Generation]:
        """The requests that can use a chunk of prefill, or begin to decode."""
        if len(self._decoder) >= self.BATCH:
            return []
        waiting = [job for job in self.jobs if job._phase in (Phase.WAITING, Phase.PREFILL)]
        return [
            job for job in waiting if job._left() > 0 or job._line is None or self._may_decode(job)
        ]

    def _may_decode(self, job: Generation) -> bool:
        alone = job._suspect or any(other._suspect for other in self.decoding())
        return not len(self._decoder) or not alone and self._decoder.accepts(job._line.cache)

    # -- prefill

    def prefill(self, job: Generation, alone: bool) -> None:
        """One chunk of a request's prompt, a large one if nobody else is here to wait for it;
        behind the last one it decodes."""
        job._phase = Phase.PREFILL
        try:
            if job.request.embed:
                return self._embed(job)
            self._restore(job)
            if job._left() > 0:
                self._read_chunk(job, self._undisturbed if alone else self.CHUNK)
                self._log_progress(job)
            if job._left() <= 0 and self._may_decode(job):
                self._start_decoding(job)
        except Exception as error:
            self._failed(error)
            if _on_gpu(error):  # which had it too long, or had no room: smaller chunks may do
                self.CHUNK = self._undisturbed = max(self.CHUNK // 2, self.LEAST)
            else:
                self._salvage(job)
            self._drop(job, error)

    def _restore(self, job: Generation) -> None:
        """Gives a request the longest beginning of its prompt that anyone has read: a line of the
        prefix cache, the disk's, or a copy from a request that runs, so that a twin or a sub-agent
        of a running request does not prefill twice. One that has begun changes over when others
        have come a chunk further."""
        tokens, begun = job._prompt.tokens, job._line is not None
        if begun and len(self.jobs) == 1 or job.request.embed:
            return
        have = len(job._line.tokens) + self.CHUNK if begun else 0
        _, length = self.prefixes.find(self.fingerprint, tokens)
        chain, kept = (
            self.disk_cache.find(self.fingerprint, tokens[:-1])
            if self.disk_cache and not begun
            else ([], 0)
        )
        shared, donor = self._most_like(job)
        line = None
        if shared > max(length, have):
            running = donor._line
            if donor._phase is Phase.DECODE:
                read, cache = self._decoder.peek(donor._number)
                running = dataclasses.replace(running, tokens=read, cache=cache)
            usable = running.restorable(min(shared, len(tokens) - 1))
            line = running.branch(usable) if usable > max(length, have) else None
        if kept > max(length, len(line.tokens) if line else 0):
            line = self.disk_cache.load(chain, kept)
        if line is None and length > have:
            line = self.prefixes.take(self.fingerprint, tokens)
        if line is None and begun:
            return
        line = line or CacheEntry([], self._new_cache())
        line.model, line.root, line.written = self.fingerprint, job._prompt.root, False
        if job._prompt.body and job.request.messages[-1]["role"] == "user":
            line.turns = [at for at in line.turns if at < job._prompt.body] + [job._prompt.body]
        if begun:
            job.usage.cached_tokens += len(line.tokens) - len(job._line.tokens)
        elif not job.usage.completion_tokens:
            job.usage.cached_tokens = len(line.tokens)
        job._line = line

    def _most_like(self, job: Generation) -> tuple[int, Generation | None]:
        """The running request that has read the most of what a request has to read, and how much
        that is."""

        def read(other: Generation) -> int:
            shared = common_prefix(other._prompt.tokens, job._prompt.tokens)
            return shared if other._phase is Phase.DECODE else min(shared, len(other._line.tokens))

        others = [other for other in self.jobs if other is not job and other._line is not None]
        return max(
            ((read(other), other) for other in others), key=lambda pair: pair[0], default=(0, None)
        )

    def _read_chunk(self, job: Generation, most: int) -> None:
        import mlx.core as mx

        tokens, line, prompt = job._prompt.tokens, job._line, job._prompt
        start, end = len(line.tokens), len(tokens) - 1
        marks = sorted(
            {
                prompt.root,
                prompt.turn,
                prompt.body or end,
                (start // self.SPARSE + 1) * self.SPARSE,
                end,
            }
        )
        stop = min(
            next(at for at in marks if at > start),
            start + (most if start < self.DEEP else self.CHUNK),
        )
        self.model(mx.array(tokens[start:stop])[None], cache=line.cache)
        mx.eval([c.state for c in line.cache])
        mx.clear_cache()
        line.tokens = tokens[:stop]
        if stop in marks and (stop < end or not prompt.body):
            line.checkpoint()

    def _log_progress(self, job: Generation) -> None:
        """Logs, now and then, how far a prompt is."""
        now, done = time.perf_counter(), len(job._line.tokens)
        if now - max(job._mark, job._progress_logged) < self.TELL or job._left() <= 0:
            return
        job._progress_logged = now
        speed = (done - job.usage.cached_tokens) / (now - job._mark)
        log.info(
            "%s: prompt %d %%, %s/%s tokens, %.0f tokens/s, %.0f s left",
            self.local.name,
            100 * done // job.prompt_tokens,
            f"{done:,}",
            f"{job.prompt_tokens:,}",
            speed,
            job._left() / speed,
        )

    def _embed(self, job: Generation) -> None:
        """A chunk of a text to embed; behind the last one there is its vector. The prefix cache has
        no part in it."""
        import mlx.core as mx

        start, pooled, cache = job._embedded or (0, None, self._new_cache())
        tokens = job._prompt.tokens[
            start : start + self.CHUNK if job._left() > self.CHUNK else None
        ]
        states = self._body(mx.array(tokens)[None], cache=cache)[0].astype(mx.float32)
        if self._pooling == "lasttoken":
            pooled = states[-1]
        elif self._pooling == "cls":
            pooled = states[0] if pooled is None else pooled
        else:
            pooled = states.sum(0) / job.prompt_tokens + (0 if pooled is None else pooled)
        mx.eval(pooled, [layer.state for layer in cache])
        mx.clear_cache()
        job._embedded = start + len(tokens), pooled, cache
        if job._left() >= 0:
            return
        vector = pooled.tolist()
        if not all(map(math.isfinite, vector)):
            raise ArithmeticError("the model's output is not a number")
        job._embedded = None
        job._emit(Embedding(vector))
        job.usage.prefill_seconds += job._lap()
        self._end(job, "stop")

    def _start_decoding(self, job: Generation) -> None:
        job.usage.prefill_seconds += job._lap()
        if job._limit <= 0:
            return self._end(job, "length")
        sampling = job.request.sampling
        job._sampler = job._sampler or make_sampler(sampling, len(self.renderer.tokenizer))
        processors = make_penalties(sampling)
        if job._grammar is not None:
            job._constraint = job._grammar.after(job._prompt.tokens[job.prompt_tokens :])
            processors.append(job._constraint)
        if budget := self.renderer.budget(job.request, job._prompt, job.prompt_tokens):
            processors.append(budget)
        job._number = self._decoder.insert(
            job._line,
            job._prompt.tokens[-1],
            job._limit - job.usage.completion_tokens,
            job._sampler,
            processors,
        )
        job._line.cache = []  # the decoder gives it back at the end
        job._phase = Phase.DECODE

    def _salvage(self, job: Generation) -> None:
        """Files the chunks that a failed prefill had finished. The layers may or may not have taken
        up more than those."""
        import mlx.core as mx

        try:
            done = len(job._line.tokens)
            torn = dataclasses.replace(job._line, tokens=job._prompt.tokens[: done + 1])
            line = torn.branch(torn.restorable(done))
            mx.eval([layer.state for layer in line.cache])
            self.prefixes.put(line)
        except Exception:
            log.info("nothing of the failed prompt could be kept", exc_info=True)

    # -- decode

    def decode(self) -> None:
        """One token for each request that decodes."""
        by_number = {job._number: job for job in self.decoding()}
        if not by_number:
            return
        try:
            responses = self._decoder.step()
        except Exception as error:
            return self.isolate_failed_batch(error)
        for response in responses:
            job = by_number[response.uid]
            try:
                self._take_token(job, response)
            except Exception as error:
                self._failed(error)
                self._decoder.discard(job._number)
                self._drop(job, error)
                if _on_gpu(error) and self.decoding():
                    return self.isolate_failed_batch(error)

    def _take_token(self, job: Generation, response: Any) -> None:
        import mlx.core as mx

        usage, parser, detokenizer = job.usage, job._parser, job._detokenizer
        # Of logits that are no numbers every sampler picks token 0; a model that has once lost them
        # never comes back.
        if response.token == 0 or usage.completion_tokens % self.INSPECTED == 0:
            with mx.stream(mx.cpu):  # on the GPU it would have to wait for the next step
                broken = math.isnan(response.logprobs[0].item())
            if broken:
                raise ArithmeticError("the model's output is not a number")
        if job._constraint is not None and job._constraint.observe(
            response.token, usage.completion_tokens
        ):
            parser.verbatim()
        usage.completion_tokens += 1
        usage.thinking_tokens += parser.state == "thinking"
        if response.finish_reason != "stop":
            detokenizer.add_token(response.token)
            if job.request.logprobs is not None:
                with mx.stream(mx.cpu):
                    job._pending_logprobs.append(
                        token_logprobs(
                            response.token,
                            response.logprobs,
                            job.request.logprobs,
                            self.renderer.token_bytes,
                        )
                    )
        if response.finish_reason:
            detokenizer.finalize()
        piece = detokenizer.last_segment
        job._raw += piece
        job._emit(*parser.feed(piece))
        if response.finish_reason:
            job._line.tokens, job._line.cache = response.all_tokens, response.prompt_cache
            self._end(job, response.finish_reason)
        elif parser.stop_sequence is not None or parser.finished:
            self._reclaim(job)
            self._end(job, "stop")

    def _reclaim(self, job: Generation) -> None:
        """Takes a request's state back from the decoder."""
        job._line.tokens, job._line.cache = self._decoder.remove(job._number)

    def isolate_failed_batch(self, error: Exception) -> None:
        """The step of those who decode has failed, and whose fault it was cannot be told: each of
        them reads what it had once more and goes on alone, where only the guilty one fails
        again."""
        jobs = self.decoding()
        self._failed(error)
        self._decoder, batch = self._new_decoder(), self._decoder._batch
        if len(jobs) == 1 or any(job._suspect for job in jobs):
            for job in jobs:
                self._drop(job, error)
            return
        log.warning(
            "a step of %d requests has failed: they go on one by one", len(jobs), exc_info=error
        )
        read = dict(zip(batch.uids, batch.tokens))
        for job in jobs:
            if job._number not in read:  # it has ended meanwhile
                self._drop(job, error)
                continue
            written = job.prompt_tokens + job.usage.completion_tokens
            self._begin_again(job, read[job._number][:written])
            job._suspect = True

    def pause(self, job: Generation) -> bool:
        """Lets a decoding request wait for memory: its state goes to the prefix cache, from where
        it goes on later. Not if it ends with its next token."""
        response = self._decoder.upcoming(job._number)
        last = (
            response.token in self.renderer.tokenizer.eos_token_ids
            or job.usage.completion_tokens + 1 >= job._limit
        )
        if not last:
            self._take_token(job, response)  # it is picked, and never will be again
        if last or job._phase is Phase.ENDED:
            return False
        self._reclaim(job)
        line = job._line
        self._begin_again(job, [*line.tokens, response.token])
        self.jobs.remove(job)
        self.prefixes.put(line)
        return True

    def _begin_again(self, job: Generation, tokens: list[int]) -> None:
        job._prompt = dataclasses.replace(job._prompt, tokens=tokens)
        job.usage.decode_seconds += job._lap()
        job._line, job._phase = None, Phase.WAITING

    # -- the end

    def drop_cancelled(self, cancelled: list[Generation]) -> None:
        """Ends those of these requests that are here; what they have computed goes to the prefix
        cache."""
        for job in [job for job in self.jobs if job in cancelled]:
            if job._phase is Phase.DECODE:
                self._reclaim(job)
            self._end(job, "stop")

    def _end(self, job: Generation, reason: str) -> None:
        import mlx.core as mx

        if job._phase is Phase.DECODE:
            job.usage.decode_seconds += job._lap()
            # The next step has changed its state already: if that fails, none is kept
            mx.synchronize()
        self._release(job)
        job._emit(*job._parser.finish(cut=reason == "length"))
        if job._phase is Phase.DECODE:
            job._line.answers[self.renderer.remember(job)] = len(job._line.tokens)
            job._read = list(job._line.tokens)
        if job._line is not None:
            self.prefixes.put(job._line)
            job._line = None
        if job._constraint is not None and job._constraint.error:
            return job._fail(
                InvalidRequest(f"the output format asks too much: {job._constraint.error}")
            )
        job._finish(reason)

    def _failed(self, error: Exception) -> None:
        """Comes first after a failure: what was computed at the same time may fail as well, and
        nobody else is to hear of it."""
        import mlx.core as mx

        self._group.failed(error)
        with contextlib.suppress(Exception):
            mx.synchronize()

    def _drop(self, job: Generation, error: Exception) -> None:
        """Fails one request; its state is not kept."""
        log.error("generation failed", exc_info=error)
        if job in self.jobs:
            self._release(job)
        job._line = None
        job._fail(
            EngineError("the model failed while generating; the server goes on, please try again")
        )

    def _release(self, job: Generation) -> None:
        self.jobs.remove(job)
        self.used = time.monotonic()
        if job.request.keep_alive is not None:
            self.keep_alive = job.request.keep_alive

    # -- the disk

    def unwritten(self) -> bool:
        """Whether there is something to write to disk."""
        return self.disk_cache is not None and self.prefixes.unwritten(self.fingerprint) is not None

    def write(self) -> None:
        """Writes one segment of what the disk has not got."""
        line = self.prefixes.unwritten(self.fingerprint)
        marks = {line.root, *line.checkpoints, *range(self.SPARSE, len(line.tokens), self.SPARSE)}
        line.written = self.disk_cache.write(self.fingerprint, line, self.renderer.answer, marks)


def _on_gpu(error: Exception) -> bool:
    """Whether it was the GPU that failed. What its commands were to write or to move, earlier
    tokens' states among it, is lost."""
    return str(error).startswith("[METAL]")
