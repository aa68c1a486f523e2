"""Measures a server as its clients see it, in one table.

    python tests/bench.py [--minutes 10] [--model NAME] [--plot FILE.png]
                          [--against URL --against-model NAME]

starts this server with its default model, or asks the one at `--url`. `--against` names a server to
compare it with (Ollama's http://localhost:11434, say); else it is compared with itself and mlx-lm's
`stream_generate`. Both sides are asked in turn, greedily, with the same prompts, none of which they
have seen before; so both models have to fit into memory together. Parts of the table can be named,
to measure nothing else: `loop`, `prefill`, `decode`, `concurrent`, `contended`. Besides, there are

    python tests/bench.py reuse [--trace FILE] [--kind KIND] [--reminders]
        a recorded session again: what of each prompt had to be prefilled
    python tests/bench.py render
        a prompt that has grown: rendering, tokenising, look-up, warm as a ratio to cold
    python tests/bench.py growth
        a prompt's look-up beside few and many conversations, files and models
    python tests/bench.py beside
        a long conversation and short ones beside it: memory, and what they cost each other
    python tests/bench.py together [--against URL --against-model NAME]
        short requests at once beside mlx-lm's server, or another; passes of sub-agents
    python tests/bench.py copy
        answers that copy from what was read: how many tokens a pass of the model brings
    python tests/bench.py soak
        64 clients that hang up and come back: what goes wrong, and memory

A trace is `{"requests": [{"body": {...Messages API...}}, ...]}`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_api import APIS, as_ollama
from bench_batch import beside
from bench_copy import copy
from bench_growth import growth
from bench_parts import PARTS, calibrate, measure, progress
from bench_prompts import made_up_trace
from bench_reuse import send, session
from bench_side import FAILURES, Generate, Side, find_side
from bench_table import ROWS, Table, machine
from bench_together import together as compare_together
from soak import Soak, memory

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def table(args: argparse.Namespace) -> None:
    """Measures the server and what it is compared with; prints and draws what came of it."""
    if args.plot and not find_spec("matplotlib"):
        raise SystemExit("bench: --plot needs matplotlib: pip install -e '.[bench]'")
    parts, trouble, seconds = args.what or list(PARTS), [], args.minutes * 60
    with target(args) as side:
        other = compared_with(args, side)
        sides = [side, other] if other else [side]
        try:
            plan = calibrate(side, other, seconds / len(parts) / len(sides) / 4)
        except FAILURES as error:
            raise SystemExit(f"bench: warming up failed: {error}") from None
        ours, theirs = (measure(sides, plan, parts, seconds / len(parts), trouble) + [{}])[:2]
    head = [machine(), f"{side.name}: {side.about}"]
    if args.against:
        head.append(f"{other.name}: {other.about}")
    else:
        theirs |= {row.key: ours[row.reference] for row in ROWS if row.reference in ours}
    head.append(
        f"prompts of {plan.words} words, long: {plan.long}, "
        f"answers of up to {plan.tokens} tokens, {plan.turns} turns"
    )
    result = Table(head, (side.name, other.name if args.against else ""), ours, theirs)
    result.told, result.short = not args.against or other.tells, bool(args.what)
    print(result)
    print("\n".join(trouble))
    if args.plot:
        result.draw(args.plot)


def compared_with(args: argparse.Namespace, side: Side) -> Side | Generate | None:
    if args.against:
        name = urlsplit(args.against).netloc
        return find_side(name, args.against, args.against_api, args.against_model)
    return None if args.url else Generate(side.model)


@contextlib.contextmanager
def target(args: argparse.Namespace, *flags: str) -> Iterator[Side]:
    """The server to measure: the one named, or one of our own for the while. Raises SystemExit if
    there is no such model."""
    if args.url:
        yield find_side("mlx-server", args.url, args.api, args.model)
        return
    from conftest import Server

    from engine import EngineError, Library

    named = contextlib.nullcontext(args.model or "default")
    with random_model(args.kind, args.what != ["reuse"]) if args.kind else named as name:
        library = Library([])
        try:
            model = library.resolve(name, trusted=True)
        except EngineError as error:
            raise SystemExit(f"bench: {error}") from None
        if not args.model and model.name == "demo" and len(library.models()) > 1:
            names = ", ".join(one.name for one in library.models())
            progress(f"this measures the built-in model; --model takes {names}")
        about = f"{model.name} ({model.quantization}, {model.size / 1e9:.1f} GB)"
        server = Server(*flags, "--model", str(model.path))
        try:
            yield Side("mlx-server", server.url, "messages", str(model.path), about)
        finally:
            server.stop()


@contextlib.contextmanager
def random_model(kind: str, slow: bool) -> Iterator[str]:
    """A model of random weights that has no way to stop early: `slow`, so large that its arithmetic
    takes the time, or tiny, with the habits of its kind's templates."""
    from habits import FAMILIES, LAST_WORDS, STRIPPED, XML_CALL, template
    from models import CONFIGS, build_model

    config = {**CONFIGS[kind], "max_position_embeddings": 131072}
    if slow:
        config |= {"num_hidden_layers": 8, "head_dim": 64, "hidden_size": 512}
        config |= {"intermediate_size": 1536, "mlp_only_layers": list(range(8))}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"] * 2
    thinks = template(call=XML_CALL, thinking=STRIPPED, top=LAST_WORDS)
    habits = {
        "qwen3": FAMILIES["stripped"],
        "hybrid": thinks.removesuffix("{% endif %}") + "<think>\n{% endif %}",
    }
    more = {"template": habits[kind]} if not slow and kind in habits else {}
    with tempfile.TemporaryDirectory() as folder:
        yield str(build_model(kind, Path(folder) / "random", config=config, **more))


def reuse(args: argparse.Namespace) -> None:
    """Sends a session's requests; prints what of each prompt could be reused, and what was."""
    with target(args) as side:
        send(side, session(args.trace, args.reminders), args.max_tokens)


def render(args: argparse.Namespace) -> None:
    """Times rendering, tokenising and the look-up of a prompt that grows."""
    from _mlx_server.inference.cache.prefix_cache import CacheEntry, PrefixCache
    from _mlx_server.inference.group import Group
    from _mlx_server.inference.prompt.renderer import PromptRenderer
    from engine import Library, Request

    local = Library([]).resolve(args.model, trusted=True)
    requests = []
    for body in made_up_trace(args.turns):
        if len(body.get("tools") or []) == 5:
            chat = as_ollama({**body, "max_tokens": 1, "temperature": 0})
            requests.append(Request(args.model, chat["messages"], tools=chat["tools"]))
    *_, first, second, third = requests[:-5]
    PromptRenderer(local).prompt(first)
    renderer, prefixes = PromptRenderer(local), PrefixCache(lambda: 1 << 40, Group())

    def look_up(request: Request) -> int:
        """The number of tokens that are found again."""
        return prefixes.find("", renderer.prompt(request).tokens)[1]

    cold, _ = timed(renderer.prompt, first)
    for request in (second, third):  # turns of other kinds than the first
        prefixes.put(CacheEntry(renderer.prompt(request).tokens, []))
    grown, again = [], []
    for request in requests[-5:]:
        gc.collect()
        for ratios in (grown, again):  # with the turn's new text to tokenise, and without
            seconds, found = timed(look_up, request)
            ratios.append(seconds / cold)
        prefixes.put(CacheEntry(renderer.prompt(request).tokens, []))
        print(
            f"{found} tokens: cold {cold * 1000:.0f} ms, "
            f"with a new turn {grown[-1]:.3f} of that, once more {again[-1]:.3f}"
        )
    print(f"median ratios {statistics.median(grown):.3f} and {statistics.median(again):.3f}")


def timed(call: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    """Processor seconds that a call takes, and what it returns."""
    started = time.thread_time()
    value = call(argument)
    return time.thread_time() - started, value


def soak(args: argparse.Namespace) -> None:
    """64 connections and 1,000 requests of all dialects, a fifth of which hang up."""
    with target(args, "--max-queue", "128") as side:
        port = urlsplit(side.url).port
        trouble = Soak(port, 64, [], requests=1000)
        trouble.learn()
        before = memory(port, [])
        started = time.perf_counter()
        report = trouble.run()
        seconds, after = time.perf_counter() - started, memory(port, [])
    print(f"{sum(report.done.values())} requests in {seconds:.0f} s: {dict(report.done)}")
    print(f"{len(report.wrong)} wrong or stuck {report.wrong[:3]}")
    print(
        f"memory, prompt cache emptied: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after "
        f"({after / before - 1:+.1%})"
    )
    print(
        f"GET /api/version within {report.slowest_version * 1000:.0f} ms (99 of 100), "
        f"{len(report.version)} times"
    )


def together(args: argparse.Namespace) -> None:
    """Short requests that come at once, and sub-agents."""
    if args.model == "demo" and not args.url:  # it is too small to show anything
        args.kind = args.kind or "qwen3"
    with target(args) as side:
        compare_together(side, compared_with(args, side) if args.against else None)


COMMANDS = {
    command.__name__: command for command in (reuse, render, growth, copy, beside, together, soak)
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join([*PARTS, *COMMANDS])
    add("what", nargs="*", help=f"{names}; without any, the whole table")
    minutes = "what the table may take (default: %(default)s)"
    add("--minutes", type=float, default=10, help=minutes)
    add("--url", help="a running server, instead of one that is started")
    add("--model", help="a name that the server knows, or a path (default: the server's)")
    add("--against", metavar="URL", help="a server to compare with")
    add("--against-model", metavar="NAME", help="the model's name there (default: its only one)")
    for option in ("--api", "--against-api"):
        add(option, choices=APIS, help="that server's API (default: the one that tells most)")
    add("--plot", metavar="FILE.png", help="draw the table, too")
    add("--trace", metavar="FILE", help="a recorded session; without it one is made up")
    add("--reminders", action="store_true", help="a system message behind each tool's result")
    add("--turns", type=int, default=20, help="turns of a made-up session to render")
    add("--max-tokens", type=int, default=8, help="length of the answers to a trace")
    add("--seeds", type=int, default=4, help="cases of each kind of answer that is replayed")
    kinds = "a model of random weights with plain, sliding or recurrent layers"
    add("--kind", choices=("qwen3", "llama_sliding", "hybrid"), help=kinds)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    known = {*PARTS, *COMMANDS} if len(args.what) == 1 else {*PARTS}
    if unknown := set(args.what) - known:
        parser.error(f"there is no part of the table named {', '.join(unknown)}")
    command = COMMANDS.get(args.what[0]) if args.what else None
    if command:
        args.model = args.model or "demo"
    (command or table)(args)


if __name__ == "__main__":
    main()
