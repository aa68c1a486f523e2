"""Counts for `/metrics`."""

from __future__ import annotations

import bisect
import collections
import itertools
import threading
from typing import Any


class Metrics:
    """Counts for `/metrics`, in Prometheus' text format 0.0.4. From any thread."""

    # Seconds to the first token
    BUCKETS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._waits = [0] * (len(self.BUCKETS) + 1)
        self._waited = 0.0

    def answered(self, dialect: str, status: int) -> None:
        """An HTTP request was answered."""
        with self._lock:
            self._requests[dialect, status] += 1

    def began(self, seconds: float) -> None:
        """An answer's first token came after so many seconds."""
        with self._lock:
            self._waits[bisect.bisect_left(self.BUCKETS, seconds)] += 1
            self._waited += seconds

    def text(self, engine: Any) -> str:
        """Everything, with the engine's figures of this moment."""
        stats = engine.stats()
        totals = stats.totals
        with self._lock:
            requests, waits, waited = dict(self._requests), list(self._waits), self._waited
        out: list[str] = []

        def metric(name: str, kind: str, about: str, *samples: tuple[str, float]) -> None:
            out.append(f"# HELP mlx_server_{name} {about}\n# TYPE mlx_server_{name} {kind}")
            out.extend(f"mlx_server_{name}{labels} {value}" for labels, value in samples)

        metric("up", "gauge", "Whether the engine works.", ("", int(engine.health() is None)))
        metric(
            "http_requests_total",
            "counter",
            "Answered requests.",
            *(
                (f'{{dialect="{dialect}",status="{status}"}}', n)
                for (dialect, status), n in sorted(requests.items())
            ),
        )
        metric(
            "generations_total",
            "counter",
            "Generations by how they ended.",
            *((f'{{ending="{ending}"}}', n) for ending, n in sorted(totals.endings.copy().items())),
        )
        metric("prompt_tokens_total", "counter", "Tokens of prompts.", ("", totals.prompt_tokens))
        metric(
            "cached_tokens_total",
            "counter",
            "Tokens of prompts that were not prefilled again.",
            ("", totals.cached_tokens),
        )
        metric(
            "completion_tokens_total",
            "counter",
            "Generated tokens.",
            ("", totals.completion_tokens),
        )
        metric("waiting_requests", "gauge", "Requests that wait.", ("", stats.waiting))
        metric(
            "running_requests",
            "gauge",
            "Requests that are prefilled or decoded.",
            ("", stats.running),
        )
        metric("loaded_models", "gauge", "Models in memory.", ("", stats.loaded))
        metric(
            "prefix_cache_bytes",
            "gauge",
            "KV states of earlier prompts.",
            ("", stats.prefix_cache_bytes),
        )
        metric(
            "prefix_cache_limit_bytes",
            "gauge",
            "Most bytes of them.",
            ("", stats.prefix_cache_limit),
        )
        metric("memory_bytes", "gauge", "What MLX holds.", ("", stats.memory))
        metric(
            "memory_limit_bytes",
            "gauge",
            "What models and states may take.",
            ("", stats.memory_limit),
        )
        below = itertools.accumulate(waits)
        metric(
            "time_to_first_token_seconds",
            "histogram",
            "From the request to the first piece of its answer.",
        )
        out += [
            f'mlx_server_time_to_first_token_seconds_bucket{{le="{bound}"}} {count}'
            for bound, count in zip([*self.BUCKETS, "+Inf"], below)
        ]
        out += [
            f"mlx_server_time_to_first_token_seconds_sum {waited}",
            f"mlx_server_time_to_first_token_seconds_count {sum(waits)}",
        ]
        return "\n".join(out) + "\n"
