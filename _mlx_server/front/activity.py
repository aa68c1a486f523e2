"""What the server does now and did lately: the answer of `GET /activity`.

| field | is |
|---|---|
| `version`, `started` | the server's version, and when it was started, in Unix seconds |
| `status` | "ok", or what is wrong |
| `default` | the model that `default` and vendors' names mean, null without any |
| `loaded` | the models in memory: `name`, `memory` (bytes of weights and prompt cache), \
`context_length`, `expires` (Unix seconds, null for never) |
| `memory` | bytes: `limit`, `used` (by MLX), `weights`, `states` (of running requests), \
`prompt_cache`, `prompt_cache_limit` |
| `queue` | `waiting` requests and the `limit` of them |
| `working` | the requests in work, see below, the oldest first |
| `recent` | the last fifty, the latest first: the fields of their log lines (`--log-json`) and \
`time`, in Unix seconds |
| `throughput` | `seconds` of an interval, and for each of the last ten minutes' a sample [`time`, \
generated, prefilled, reused], the latter three in tokens/s |
| `warnings` | the log's last fifty, without paths and, where there are several keys, without what \
requests and answers say: `time`, `level`, `message`, the latest first |

A request in work; where its prompt is still rendered, only what does not come from the model:

| field | is |
|---|---|
| `id` | by which `DELETE /activity/ID` cancels it |
| `route`, `dialect`, `model`, `priority` | what was asked for, and how |
| `phase` | "preparing" (its prompt is rendered), "loading" (its model is not in memory yet), \
"waiting", "prefill" or "decode" |
| `seconds` | since it came |
| `prompt_tokens`, `read_tokens`, `cached_tokens` | of the prompt: all, read so far, and of these \
not computed again |
| `seconds_left` | of its prefill, null in other phases |
| `completion_tokens`, `thinking_tokens` | generated so far |
| `first_token_seconds` | from its arrival to the first token, null before |
| `tokens_per_second` | of the prefill or of the answer, null before |
| `tokens_per_pass` | that one run of the model gave, null before |
"""

from __future__ import annotations

import collections
import contextlib
import logging
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterator

from _mlx_server import __version__
from _mlx_server.front.logs import shortened
from _mlx_server.front.request_log import RequestLog
from _mlx_server.inference.catalog.models import Loaded
from _mlx_server.inference.generation import Generation
from _mlx_server.inference.protocol import Stats, Totals, without_paths
from _mlx_server.inference.sequence import State
from _mlx_server.wire.fields import Object

RECENT = 50  # requests, and warnings
INTERVAL = 5.0  # seconds between two samples
SAMPLES = 120  # ten minutes of them
SHARED_GRAIN = 256  # tokens, of which reused ones are told multiples where there are several keys
_QUOTED = re.compile(r"%[.\d]*[a-z]")  # where a log message has what it is about
MEASURABLE = 64  # tokens of a prefill below which its speed says nothing


class Activity(logging.Handler):
    """The requests in work and, as a handler of the log, what was logged of earlier ones and the
    warnings. May be used from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._started = time.time()
        self._working: dict[str, RequestLog] = {}
        self._recent: collections.deque[Object] = collections.deque(maxlen=RECENT)
        self._warnings: collections.deque[tuple[Object, str]] = collections.deque(maxlen=RECENT)
        # Four numbers each, in one block: an object of its own would keep the memory around it
        # from going back to the system
        self._samples = array("d")
        self._sampled = time.monotonic()
        self._counted = (0, 0, 0)  # tokens at that time

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logging module, within `lock`."""
        figures = getattr(record, "figures", None)
        if figures:
            self._recent.appendleft({"time": record.created, **figures})
        elif record.levelno >= logging.WARNING:
            level, message = record.levelname.lower(), without_paths(record.getMessage())
            plain = message  # all but the start's may quote a request or an answer
            if record.thread != threading.main_thread().ident:
                plain = _QUOTED.sub("…", str(record.msg))
            shown = {"time": record.created, "level": level, "message": shortened(message)}
            self._warnings.appendleft((shown, plain))

    @contextlib.contextmanager
    def working(self, record: RequestLog) -> Iterator[None]:
        """Within it a request is in work."""
        with self._guard():
            self._working[record.id] = record
        try:
            yield
        finally:
            with self._guard():
                del self._working[record.id]

    def cancel(self, id: str) -> bool:
        """Cancels a request in work; returns whether there is one."""
        with self._guard():
            record = self._working.get(id)
        if record is not None:
            record.cancelled = True
        return record is not None

    def sample(self, totals: Callable[[], Totals]) -> None:
        """Called several times a second: notes every INTERVAL how many tokens came since."""
        now = time.monotonic()
        elapsed = now - self._sampled
        if elapsed < INTERVAL:
            return
        is_now = totals()
        counts = (is_now.completion_tokens, is_now.prefilled_tokens, is_now.cached_tokens)
        rates = [
            round((count - before) / elapsed, 1)
            for count, before in zip(counts, self._counted, strict=True)
        ]
        with self._guard():
            self._samples.extend([round(time.time(), 1), *rates])
            del self._samples[: -4 * SAMPLES]
        self._sampled, self._counted = now, counts

    def report(
        self,
        status: str | None,
        default: str | None,
        stats: Stats,
        loaded: list[Loaded],
        shared: bool,
    ) -> Object:
        """The answer. `status` is what is wrong. Of a `shared` server it quotes nothing that was
        said in a request or in an answer, and reused tokens are coarse."""
        with self._guard():
            working, recent = list(self._working.values()), list(self._recent)
            numbers, warned = iter(self._samples.tolist()), list(self._warnings)
        warnings = [{**shown, "message": plain} if shared else shown for shown, plain in warned]
        names = {one.model.name for one in loaded}
        rows = [row for record in working for row in _working_rows(record, names)]
        if shared:
            rows = [_concealed(row) for row in rows]
            recent = [_concealed(row) for row in recent]
        return {
            "version": __version__,
            "started": self._started,
            "status": status or "ok",
            "default": default,
            "loaded": [
                {
                    "name": one.model.name,
                    "memory": one.size,
                    "context_length": one.context_length,
                    "expires": one.expires,
                }
                for one in loaded
            ],
            "memory": {
                "limit": stats.memory_limit,
                "used": stats.memory,
                "weights": stats.weights,
                "states": stats.states,
                "prompt_cache": stats.prefix_cache_bytes,
                "prompt_cache_limit": stats.prefix_cache_limit,
            },
            "queue": {"waiting": stats.waiting, "limit": stats.max_waiting},
            "working": rows,
            "recent": recent,
            "throughput": {"seconds": INTERVAL, "samples": list(zip(*[numbers] * 4, strict=True))},
            "warnings": warnings,
        }

    def _guard(self) -> contextlib.AbstractContextManager[object]:
        assert self.lock is not None
        return self.lock


def _concealed(row: Object) -> Object:
    kept = {key: value for key, value in row.items() if key != "miss"}
    if "ending" in kept:
        kept["ending"] = kept["ending"].partition(":")[0]
    if "cached_tokens" in kept:
        kept["cached_tokens"] -= kept["cached_tokens"] % SHARED_GRAIN
    return kept


def _working_rows(record: RequestLog, loaded: set[str]) -> list[Object]:
    """A request, or each of the generations of one that wants several."""
    common = {
        "id": record.id,
        "route": record.route,
        "dialect": record.dialect,
        "model": record.model,
        "seconds": record.seconds,
        "first_token_seconds": record.first_token_seconds,
    }
    going = [one for one in record.generations if one.sequence.state is not State.ENDED]
    if not going:
        return [{**common, "phase": "preparing"}]
    return [{**common, **_progress(one, one.model.name in loaded)} for one in going]


def _progress(generation: Generation, loaded: bool) -> Object:
    sequence, usage = generation.sequence, generation.usage
    state, lap = sequence.state, time.perf_counter() - sequence.lap_start
    read = min(usage.cached_tokens + usage.prefilled_tokens, sequence.prompt_tokens)
    phase, rate, left = state.name.lower(), None, None
    if state is State.WAITING and not loaded:
        phase = "loading"
    elif state is State.PREFILL and usage.prefilled_tokens >= MEASURABLE:
        rate = usage.prefilled_tokens / (usage.prefill_seconds + lap)
        left = (sequence.prompt_tokens - read) / rate
    elif state is State.DECODE and usage.completion_tokens:
        rate = usage.completion_tokens / (usage.decode_seconds + lap)
    return {
        "phase": phase,
        "priority": generation.request.priority.name.lower(),
        "prompt_tokens": sequence.prompt_tokens,
        "read_tokens": read,
        "cached_tokens": usage.cached_tokens,
        "seconds_left": left,
        "completion_tokens": usage.completion_tokens,
        "thinking_tokens": usage.thinking_tokens,
        "tokens_per_second": rate,
        "tokens_per_pass": usage.completion_tokens / usage.decode_passes
        if usage.decode_passes
        else None,
    }
