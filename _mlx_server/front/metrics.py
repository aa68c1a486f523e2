"""Counts for `/metrics`."""

from __future__ import annotations

import bisect
import collections
import itertools
import threading

from _mlx_server.inference.protocol import Stats

# Seconds to the first token
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counts for `/metrics`, in Prometheus' text format 0.0.4. May be used from any thread.

    https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._first_tokens = [0] * (len(BUCKETS) + 1)  # answers in each bucket
        self._first_token_seconds = 0.0

    def answered(self, dialect: str, status: int) -> None:
        """An HTTP request was answered."""
        with self._lock:
            self._requests[dialect, status] += 1

    def first_token(self, seconds: float) -> None:
        """An answer's first token came after so many seconds."""
        with self._lock:
            self._first_tokens[bisect.bisect_left(BUCKETS, seconds)] += 1
            self._first_token_seconds += seconds

    def text(self, stats: Stats, healthy: bool) -> str:
        """Everything, with the engine's figures of this moment and whether it works."""
        with self._lock:
            requests = sorted(self._requests.items())
            counts, seconds = list(self._first_tokens), self._first_token_seconds
        by_status = [
            (f'{{dialect="{dialect}",status="{status}"}}', n) for (dialect, status), n in requests
        ]
        parts = [
            _metric("up", "gauge", "Whether the engine works.", ("", int(healthy))),
            _metric("http_requests_total", "counter", "Answered requests.", *by_status),
            *_engine_metrics(stats),
            _histogram(counts, seconds),
        ]
        return "\n".join(parts) + "\n"


def _engine_metrics(stats: Stats) -> list[str]:
    totals = stats.totals
    endings = [(f'{{ending="{name}"}}', n) for name, n in sorted(totals.endings.copy().items())]
    counters = [
        ("prompt_tokens_total", "Tokens of prompts.", totals.prompt_tokens),
        (
            "cached_tokens_total",
            "Tokens of prompts that were not prefilled again.",
            totals.cached_tokens,
        ),
        ("prefilled_tokens_total", "Tokens of prompts that were read.", totals.prefilled_tokens),
        (
            "prefill_passes_total",
            "Forward passes that have read prompts, one or several at once.",
            totals.prefill_passes,
        ),
        ("completion_tokens_total", "Generated tokens.", totals.completion_tokens),
        ("decode_passes_total", "Passes that generated them.", totals.decode_passes),
        ("images_read_total", "Images that a model has looked at.", totals.images_read),
    ]
    drafts = [
        ("draft_tokens_total", "Drafted tokens.", totals.draft_tokens),
        ("accepted_tokens_total", "Drafted tokens that were right.", totals.accepted_tokens),
    ]
    gauges = [
        (
            "tokens_per_pass",
            "Generated tokens by the passes that generated them.",
            round(totals.completion_tokens / max(1, totals.decode_passes), 2),
        ),
        ("waiting_requests", "Requests that wait.", stats.waiting),
        ("running_requests", "Requests that are prefilled or decoded.", stats.running),
        ("loaded_models", "Models in memory.", stats.loaded),
        ("unmeasured_models", "Those still without drafts.", stats.unmeasured),
        ("prefix_cache_bytes", "KV states of earlier prompts.", stats.prefix_cache_bytes),
        ("prefix_cache_limit_bytes", "Most bytes of them.", stats.prefix_cache_limit),
        ("memory_bytes", "What MLX holds.", stats.memory),
        ("memory_limit_bytes", "What models and states may take.", stats.memory_limit),
    ]
    return [
        _metric("generations_total", "counter", "Generations by how they ended.", *endings),
        *(_metric(name, "counter", about, ("", n)) for name, about, n in counters),
        *(_metric(name, "counter", about, *_by_drafter(n)) for name, about, n in drafts),
        *(_metric(name, "gauge", about, ("", n)) for name, about, n in gauges),
    ]


def _by_drafter(counts: collections.Counter[str]) -> list[tuple[str, float]]:
    return [(f'{{drafter="{name}"}}', n) for name, n in sorted(counts.copy().items())]


def _histogram(counts: list[int], seconds: float) -> str:
    """The time to the first token: the answers in each of BUCKETS and beyond, their sum."""
    name = "time_to_first_token_seconds"
    about = "From the request to the first piece of its answer."
    below = zip([*BUCKETS, "+Inf"], itertools.accumulate(counts), strict=True)
    samples = [(f'_bucket{{le="{bound}"}}', count) for bound, count in below]
    return _metric(name, "histogram", about, *samples, ("_sum", seconds), ("_count", sum(counts)))


def _metric(name: str, kind: str, about: str, *samples: tuple[str, float]) -> str:
    """A metric with its samples, each a suffix of the name with labels, and a value."""
    head = f"# HELP mlx_server_{name} {about}\n# TYPE mlx_server_{name} {kind}"
    return "\n".join([head, *(f"mlx_server_{name}{suffix} {value}" for suffix, value in samples)])
