"""Requests that run at the same time, in an engine of this process: what they cost each other."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from models import CONFIGS, build_model

from _mlx_server.inference.cache.prefix_cache import CacheEntry
from engine import Engine, Generation, Request

LONG, SHORT, SHORTS = 40_000, 50, 15  # tokens of a conversation and of others, how many those are
ANSWER = 256  # tokens, enough for all to be running together


@dataclass
class Timed:
    """When each token of an answer came, in seconds since the request."""

    generation: Generation
    started: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)

    def run(self) -> Timed:
        seen = 0
        for _ in self.generation:
            count = self.generation.usage.completion_tokens
            self.seconds += [time.perf_counter() - self.started] * (count - seen)
            seen = count
        return self

    def step(self) -> float:
        """Seconds between two tokens, the median."""
        pairs = zip(self.seconds, self.seconds[1:], strict=False)
        return statistics.median(after - before for before, after in pairs)


def tokens(count: int, seed: int) -> list[int]:
    """A prompt that shares no beginning with those of other seeds."""
    return [3 + (seed * 131 + at * (7 + seed % 13)) % 500 for at in range(count)]


@contextlib.contextmanager
def random_engine() -> Iterator[Engine]:
    """An engine with a small model that answers with noise."""
    config = {**CONFIGS["qwen3"], "max_position_embeddings": 131072}
    with tempfile.TemporaryDirectory() as folder:
        path = build_model("qwen3", Path(folder) / "random", config=config)
        with Engine(str(path)) as engine:
            yield engine


def ask(engine: Engine, prompt: list[int], limit: int) -> Timed:
    return Timed(engine.submit(Request("default", prompt=prompt, max_tokens=limit)))


def fill(engine: Engine, prompt: list[int]) -> None:
    """Makes the engine believe that it has read a prompt: its state is noise."""
    import mlx.core as mx

    runner = next(iter(engine.pool.runners.values()))
    cache = runner.weights.new_cache()
    one = runner.model.args
    for layer in cache:
        shape = 1, one.num_key_value_heads, len(prompt), one.head_dim
        layer.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    mx.eval([layer.state for layer in cache])
    engine.pool.prefixes.put(CacheEntry(prompt, cache, model=runner.fingerprint))


def beside(_: argparse.Namespace) -> None:
    """A long conversation alone, then beside short requests that come one by one."""
    import mlx.core as mx

    with random_engine() as engine, ThreadPoolExecutor(SHORTS + 1) as pool:
        prompt = tokens(LONG, 0)
        ask(engine, tokens(SHORT, 100), 4).run()
        alone = statistics.median(
            ask(engine, tokens(SHORT, 101 + n), 4).run().seconds[0] for n in range(5)
        )
        fill(engine, prompt[:-1])
        step = ask(engine, prompt, 16).run().step()
        runner = next(iter(engine.pool.runners.values()))
        long = ask(engine, prompt, ANSWER)
        running = pool.submit(long.run)
        while len(long.seconds) < 4 and not running.done():
            time.sleep(0.01)
        mx.reset_peak_memory()
        shorts = []
        for number in range(SHORTS):
            shorts.append(ask(engine, tokens(SHORT + 10 * number, 200 + number), ANSWER))
            answered = pool.submit(shorts[-1].run)
            while not shorts[-1].seconds and not answered.done():
                time.sleep(0.001)
        begun = len(long.seconds)
        while len(long.seconds) < begun + 10 and not running.done():
            time.sleep(0.01)
        places = [runner.decode_batch.find(one.number) for one in runner.decoding()]
        groups = {id(group): group for group, _ in places}
        real = sum(runner.state_size.nbytes(group.lengths()[at]) for group, at in places)
        held = sum(layer.nbytes for group in groups.values() for layer in group.prompt_cache)
        counted = engine.pool.committed + engine.pool.prefixes.nbytes
        active, peak = mx.get_active_memory(), mx.get_peak_memory()
        crowded = long.seconds[begun:]
        long.generation.cancel()
        running.result()
        for short in shorts:
            short.generation.cancel()
    if len(crowded) < 3:
        raise SystemExit("bench: the long answer ended before the short ones had begun")
    pairs = zip(crowded, crowded[1:], strict=False)
    between = statistics.median(after - before for before, after in pairs)
    first = statistics.median(short.seconds[0] for short in shorts)
    print(f"{LONG} tokens beside {len(places) - 1} short streams, in {len(groups)} groups")
    print(f"KV of the batch / of its tokens: {held / real:.2f} ({held / 1e6:.0f} MB)")
    megabytes = f"{active / 1e6:.0f}, at most {peak / 1e6:.0f} MB"
    print(f"active / counted: {active / counted:.2f} ({megabytes})")
    print(f"first token of a short one / alone: {first / alone:.2f} ({first * 1e3:.0f} ms)")
    print(f"step of the long one / alone: {between / step:.2f} ({between * 1e3:.0f} ms)")
