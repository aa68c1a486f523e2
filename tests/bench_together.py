"""Short requests that come at once, to this server and mlx-lm's in turn; and sub-agents, in an
engine of this process."""

from __future__ import annotations

import contextlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_prompts import say
from bench_side import FAILURES, Side, find_side, get
from models import CONFIGS, build_model

from _mlx_server.inference.cache.layers import is_trimmable
from _mlx_server.inference.cache.prefix_cache import CacheEntry
from engine import Engine, Request

COUNT, TOKENS = 8, 48  # requests at once, tokens of an answer
PROMPT = "{}: Write a story of 1000 words about a ship."  # about 50 tokens
PREFIX, NEW = 12_000, 200  # tokens that sub-agents share, and that each has for itself
ROUNDS = 9
PATIENCE = 120.0  # seconds until mlx-lm's server has to answer
# Weights that outweigh the state of a conversation, as real ones do
AGENTS = {
    **CONFIGS["hybrid"],
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "mlp_only_layers": [],
    "moe_intermediate_size": 256,
}
Rounds = list[tuple[float, ...]]


@contextlib.contextmanager
def mlx_lm_server(model: str) -> Iterator[Side]:
    """mlx-lm's own server with a model, given by its folder, for the while."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(*FAILURES):
                if get(url, "/health"):
                    yield find_side("mlx_lm.server", url, "chat", model)
                    return
            time.sleep(0.1)
        raise SystemExit("bench: mlx_lm.server does not answer")
    finally:
        process.terminate()
        process.wait()


def at_once(side: Side, count: int, salt: str, tokens: int) -> tuple[float, float]:
    """Seconds until the last of so many requests has its first piece, and their tokens/s."""
    bodies = [say(PROMPT.format(f"{number}{salt}"), tokens) for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(side.ask, bodies))
    seconds = max(answer.first + answer.rest for answer in answers)
    return max(answer.first for answer in answers), sum(one.tokens for one in answers) / seconds


def run(side: Side, salt: str) -> tuple[float, ...]:
    """Seconds to the first token, alone and of the last one at once; tokens/s, likewise."""
    # Not every token shows: an answer of one token is timed by its end.
    firsts = [at_once(side, count, f"{salt}a{count}", 1)[0] for count in (1, COUNT)]
    return *firsts, *(at_once(side, count, f"{salt}b{count}", TOKENS)[1] for count in (1, COUNT))


def compare(sides: tuple[Side, Side]) -> None:
    """Prints what requests at once cost each side, and ours as a ratio to theirs."""
    rounds: dict[str, Rounds] = {side.name: [] for side in sides}
    for number in range(-1, ROUNDS):
        for side in sides if number % 2 else sides[::-1]:
            figures = run(side, f"r{number}")
            if number >= 0:  # in the first round kernels are compiled
                rounds[side.name].append(figures)
    for name, figures in rounds.items():
        print(f"{name}: first token alone {middle(lambda one: one[0] * 1000, figures)} ms")
        print(f"  last first token of {COUNT} / alone: {middle(lambda o: o[1] / o[0], figures)}")
        print(f"  tokens/s of {COUNT} / of one: {middle(lambda o: o[3] / o[2], figures)}")
    pairs = list(zip(*rounds.values(), strict=True))
    titles = "first token alone", f"last first token of {COUNT}", "tokens/s of one"
    for at, title in enumerate((*titles, f"tokens/s of {COUNT}")):
        ratio = middle(lambda pair, at=at: pair[0][at] / pair[1][at], pairs)
        print(f"{title}, {' / '.join(rounds)}: {ratio}")


def middle(figure: Callable, rounds: list) -> str:
    """The median of a figure, and the quartiles."""
    low, median, high = statistics.quantiles(map(figure, rounds))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def fill(engine: Engine, prompt: list[int]) -> None:
    """Makes the engine believe that it has read a prompt: its state is noise."""
    import mlx.core as mx

    runner = next(iter(engine.pool.runners.values()))
    cache = runner.weights.new_cache()
    runner.model(mx.array([prompt[:1]]), cache=cache)
    for layer in filter(is_trimmable, cache):
        _, heads, _, size = layer.keys.shape
        shape = 1, heads, len(prompt) - 1, size
        layer.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    mx.eval([layer.state for layer in cache])
    entry = CacheEntry(prompt, cache, root=len(prompt), model=runner.fingerprint)
    entry.add_checkpoint()
    kept = [layer.state for layer in entry.checkpoints[len(prompt)].layers if layer]
    mx.eval(kept)  # another thread must not compute it
    engine.pool.prefixes.put(entry)


def agents(engine: Engine, count: int, seed: int) -> int:
    """How many passes it takes to read so many sub-agents' prompts, which come at once."""
    rng = random.Random(seed)
    before = engine.stats().totals.prefill_passes
    shared = [5 + at % 400 for at in range(PREFIX)]
    prompts = [[*shared, *rng.choices(range(5, 500), k=NEW)] for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(engine.submit, Request("default", prompt=one)) for one in prompts]
        for one in asked:
            next(one.result().text())
    passes = engine.stats().totals.prefill_passes - before
    for one in asked:
        one.result().cancel()
    return passes


def sub_agents() -> None:
    """Prints what sub-agents take that come at once, behind a prefix that was read before."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_model("", Path(folder) / "random", config=AGENTS)
        with Engine(str(path)) as engine:
            list(engine.submit(Request("default", prompt=[5], max_tokens=1)))
            fill(engine, [5 + at % 400 for at in range(PREFIX)])
            one = [agents(engine, 1, seed) for seed in range(3)]
            many = [agents(engine, COUNT, seed) for seed in range(10, 15)]
    print(f"passes for the prompts of one sub-agent: {one}, of {COUNT} at once: {many}")


def together(side: Side, other: Side | None) -> None:
    """Prints what short requests at once cost, also the other side, mlx-lm's server if there is
    none, and what sub-agents do."""
    print(f"{side.name}: {side.about}")
    with contextlib.nullcontext(other) if other else mlx_lm_server(side.model) as peer:
        compare((side, peer))
    sub_agents()
