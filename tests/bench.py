"""Measures a server as its clients see it. Every command starts this server with the built-in model, unless told otherwise.

    python tests/bench.py reuse [--trace FILE]     a recorded session again: what of each prompt had to be prefilled
    python tests/bench.py loop [--turns N]         an agent's session in which each turn answers the model's last one
    python tests/bench.py decode                   tokens/s over HTTP as a ratio to mlx-lm in one process
    python tests/bench.py prefill                  the same for reading a prompt
    python tests/bench.py render                   a prompt that has grown: rendering, tokenising and look-up, warm as a ratio to cold
    python tests/bench.py concurrent               many streams at once, as a ratio to one and to mlx-lm's server
    python tests/bench.py contended                how long a short request waits while long prompts are read
    python tests/bench.py soak                     64 clients that hang up and come back: what goes wrong, and memory

`reuse` and `loop` measure any server: `--url http://localhost:8080 --model NAME`, with `--api chat` one that speaks
`/v1/chat/completions` instead of `/v1/messages`. A trace is `{"requests": [{"body": {...Messages API...}}, ...]}`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


# ------------------------------------------------------------------ one request


@dataclass
class Answer:
    """What a request cost: tokens of the prompt and those of them that were read before, tokens of the answer, seconds to the
    first piece of it and from there to the last; and its content blocks in the Messages API's form."""

    prompt: int = 0
    reused: int = 0
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    content: list[dict] = field(default_factory=list)


def ask(url: str, api: str, body: dict, headers: dict[str, str] | None = None) -> Answer:
    """Sends a Messages API body, streamed, in that form or as a chat completion. Raises OSError for a status that is not 200."""
    parts = urlsplit(url)
    path = "/v1/messages" if api == "messages" else "/v1/chat/completions"
    payload = {**body, "stream": True} if api == "messages" else as_chat(body)
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=3600)
    headers = {"Content-Type": "application/json", "x-api-key": "bench", "anthropic-version": "2023-06-01", **(headers or {})}
    started, seen = time.perf_counter(), 0.0
    connection.request("POST", parts.path.rstrip("/") + path, json.dumps(payload).encode(), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise OSError(f"{url}{path} answered {response.status}: {response.read(500).decode(errors='replace')}")
    answer = Answer()
    for line in response:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        if (read_event if api == "messages" else read_chunk)(json.loads(line[5:]), answer):
            seen = time.perf_counter()
            answer.first = answer.first or seen - started
    connection.close()
    answer.rest = max(0.0, seen - started - answer.first)
    for block in answer.content:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json") or "{}")
    return answer


def read_event(event: dict, answer: Answer) -> bool:
    """Takes up an event of the Messages API; whether it brought a piece of the answer."""
    usage = event.get("message", event).get("usage") or {}
    if "input_tokens" in usage:
        cached = usage.get("cache_read_input_tokens") or 0
        answer.reused, answer.prompt = cached, usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)
    answer.tokens = usage.get("output_tokens", answer.tokens)
    if event["type"] == "content_block_start":
        answer.content.append({**event["content_block"], **({"json": ""} if event["content_block"]["type"] == "tool_use" else {})})
    elif event["type"] == "content_block_delta":
        for kind in ("text", "thinking", "signature"):
            if kind in event["delta"]:
                answer.content[-1][kind] = answer.content[-1].get(kind, "") + event["delta"][kind]
        if "partial_json" in event["delta"]:
            answer.content[-1]["json"] += event["delta"]["partial_json"]
    return event["type"] == "content_block_delta"


def read_chunk(chunk: dict, answer: Answer) -> bool:
    """The same for a chat completion's chunk."""
    if usage := chunk.get("usage"):
        answer.prompt, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
    if text := delta.get("content"):
        if not answer.content or answer.content[-1]["type"] != "text":
            answer.content.append({"type": "text", "text": ""})
        answer.content[-1]["text"] += text
    for call in delta.get("tool_calls") or []:
        if call.get("id"):
            answer.content.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "json": ""})
        answer.content[-1]["json"] += call["function"].get("arguments") or ""
    return bool(delta.get("content") or delta.get("tool_calls") or delta.get("reasoning_content") or delta.get("reasoning"))


def as_chat(body: dict) -> dict:
    """A Messages API body as one of /v1/chat/completions."""
    messages: list[dict] = [{"role": "system", "content": "\n\n".join(b["text"] for b in blocks(body.get("system") or []))}]
    for message in body["messages"]:
        texts, calls = [], []
        for block in blocks(message["content"]):
            if block["type"] == "text":
                texts.append(block["text"])
            elif block["type"] == "tool_use":
                calls.append({"id": block["id"], "type": "function",
                              "function": {"name": block["name"], "arguments": json.dumps(block["input"])}})
            elif block["type"] == "tool_result":
                text = "\n".join(b.get("text", "") for b in blocks(block.get("content") or []))
                messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        if texts or calls:
            role = message["role"] if message["role"] != "system" else "user"
            messages.append({"role": role, "content": "\n\n".join(texts), **({"tool_calls": calls} if calls else {})})
    tools = [{"type": "function", "function": {"name": t["name"], "description": t.get("description", ""),
                                               "parameters": t["input_schema"]}} for t in body.get("tools") or [] if "input_schema" in t]
    return {"model": body["model"], "messages": messages, "max_tokens": body["max_tokens"], "stream": True, "temperature": 0,
            "stream_options": {"include_usage": True}, **({"tools": tools} if tools else {})}


def blocks(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# ------------------------------------------------------------------ recorded and made-up sessions


def made_up_trace(turns: int = 12, seed: int = 5) -> list[dict]:
    """Requests as an agent sends them: a growing conversation with tools, titles and a sub-agent's in between."""
    rng = random.Random(seed)
    library = sorted(Path(contextlib.__file__).parent.glob("*.py"))
    source = "\n".join(path.read_text("utf-8") for path in library[::4])
    words = [match.span() for match in re.finditer(r"\S+", source)]

    def prose(count: int) -> str:
        """So many words of real source code in a row: what agents read, and as varied."""
        start = rng.randrange(len(words) - count)
        return source[words[start][0]:words[start + count - 1][1]]

    def tool(name: str) -> dict:
        properties = {path.stem: {"type": "string", "description": prose(12)} for path in rng.sample(library, 3)}
        return {"name": name, "description": prose(150), "input_schema": {"type": "object", "properties": properties}}

    tools, system = [tool(name) for name in ("Bash", "Read", "Edit", "Grep", "Task")], prose(1200)
    messages: list[dict] = []
    bodies: list[dict] = []
    for turn in range(turns):
        if turn % 3 == 0:
            text = f"<system-reminder>\n{prose(60)}\n</system-reminder>\n{prose(20)}"
            messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        marked = [*messages[:-1], {**messages[-1], "content": [
            *messages[-1]["content"][:-1], {**messages[-1]["content"][-1], "cache_control": {"type": "ephemeral"}}]}]
        bodies.append({"system": [{"type": "text", "text": system}], "tools": tools, "messages": marked})
        if turn % 4 == 1:
            bodies.append({"system": [{"type": "text", "text": "Write a title."}], "messages": [{"role": "user", "content": prose(40)}]})
        if turn % 5 == 2:
            bodies.append({"system": [{"type": "text", "text": system[:2000]}], "tools": tools[:3],
                           "messages": [{"role": "user", "content": prose(300)}]})
        if turn % 3 == 2:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": prose(30)}]})
        else:
            call = {"type": "tool_use", "id": f"toolu_{turn:04}", "name": "Bash", "input": {"command": prose(6)}}
            messages.append({"role": "assistant", "content": [{"type": "text", "text": prose(8)}, call]})
            messages.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": call["id"], "content": prose(rng.choice((20, 200, 900)))}]})
    return bodies


def pieces(body: dict) -> list[str]:
    """What a prompt consists of, in order, without what is no part of it: two bodies that begin alike share a beginning."""
    def clean(block: Any) -> str:
        return json.dumps({key: value for key, value in block.items() if key != "cache_control"}, sort_keys=True)

    system = [clean(b) for b in blocks(body.get("system") or []) if not b["text"].startswith("x-anthropic-billing-header")]
    said = [message["role"] + clean(block) for message in body["messages"] for block in blocks(message["content"])]
    return [clean(tool) for tool in body.get("tools") or []] + system + said


# ------------------------------------------------------------------ the commands


@contextlib.contextmanager
def target(args: argparse.Namespace, *flags: str) -> Iterator[str]:
    """The server to measure: the one named, or one of our own for the while."""
    if args.url:
        yield args.url
        return
    from conftest import Server

    with random_model(args, busy=False) if args.kind else contextlib.nullcontext(args.model) as args.model:
        server = Server(*flags, "--model", args.model)
        try:
            yield server.url
        finally:
            server.stop()


def reuse(args: argparse.Namespace) -> None:
    bodies = [r["body"] for r in json.loads(Path(args.trace).read_text("utf-8"))["requests"]] if args.trace else made_up_trace()
    before: list[tuple[list[str], int]] = []
    reusable_sum = reused_sum = 0
    print(f"{'#':>3} {'prompt':>8} {'reusable':>8} {'reused':>8} {'prefilled':>9} {'first token':>12}")
    with target(args) as url:
        for number, body in enumerate(bodies, 1):
            answer = ask(url, args.api, {**body, "model": args.model, "max_tokens": args.max_tokens})
            parts = pieces(body)
            # A recorded answer is not the one the model gives here: the earlier prompt is what can be reused.
            reusable = max((tokens for earlier, tokens in before if parts[: len(earlier)] == earlier), default=0)
            before.append((parts, answer.prompt))
            reusable_sum, reused_sum = reusable_sum + reusable, reused_sum + min(reusable, answer.reused)
            print(f"{number:3} {answer.prompt:8} {reusable:8} {answer.reused:8} {answer.prompt - answer.reused:9} {answer.first:10.3f} s")
    print(f"reused {reused_sum} of {reusable_sum} reusable tokens: {reused_sum / max(1, reusable_sum):.2%}")


def loop(args: argparse.Namespace) -> None:
    tools = [{"name": "Bash", "description": "Runs a command. " * 60, "input_schema": {
        "type": "object", "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}}, "required": ["command"]}}]
    body = {"max_tokens": 200, "system": "You are an agent. " * 300, "tools": tools}
    messages: list[dict] = [{"role": "user", "content": "run echo 0"}]
    prefilled = new = known = 0
    print(f"{'#':>3} {'prompt':>8} {'reused':>8} {'new':>6} {'prefilled':>9} {'first token':>12}  answer")
    with target(args) as url:
        for number in range(1, args.turns * 2 + 1):
            answer = ask(url, args.api, {**body, "model": args.model, "messages": messages})
            calls = [block for block in answer.content if block["type"] == "tool_use"]
            shown = str(calls[0]["input"] if calls else "".join(b.get("text", "") for b in answer.content))
            fresh, read = answer.prompt - known, answer.prompt - answer.reused
            print(f"{number:3} {answer.prompt:8} {answer.reused:8} {fresh:6} {read:9} {answer.first:10.3f} s  {shown[:60]}")
            if number > 1:
                prefilled, new = prefilled + read, new + fresh
            known = answer.prompt + answer.tokens
            for call in calls:  # agents send inputs back validated: in another order, with defaults
                call["input"] = {"timeout": 120000, **dict(reversed(call["input"].items()))}
            messages.append({"role": "assistant", "content": answer.content or [{"type": "text", "text": "(nothing)"}]})
            messages.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": call["id"], "content": f"line {number}"} for call in calls
            ] or f"run echo {number}"})
    print(f"prefilled {prefilled} for {new} new tokens: {prefilled / new:.3f}")


def decode(args: argparse.Namespace) -> None:
    from mlx_lm import load, stream_generate

    with random_model(args, busy=True) as path, target(argparse.Namespace(url=None, kind=None, model=path)) as url:
        model, tokenizer = load(path)
        body = {"model": path, "max_tokens": args.tokens, "messages": [{"role": "user", "content": "go on"}], "temperature": 0}
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        ratios = []
        for run in range(args.runs + 1):
            answer = ask(url, "messages", body)
            *_, last = stream_generate(model, tokenizer, prompt, max_tokens=args.tokens)
            ours = (answer.tokens - 1) / answer.rest
            if run:  # the first one warms up
                ratios.append(ours / last.generation_tps)
                print(f"HTTP {ours:8.1f} tokens/s, in process {last.generation_tps:8.1f} tokens/s, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


def prefill(args: argparse.Namespace) -> None:
    from mlx_lm import load, stream_generate

    from engine import Engine

    with random_model(args, busy=True) as path, Engine(path) as engine:
        model, tokenizer = load(path)
        ratios = []
        for run in range(args.runs + 1):
            text = f"{run} " + "read " * args.tokens
            answer = engine.chat(text, max_tokens=1)
            for _ in answer:
                pass
            ours = answer.usage.prompt_tokens / answer.usage.prefill_seconds
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            *_, last = stream_generate(model, tokenizer, prompt, max_tokens=1, prefill_step_size=512)
            if run:
                ratios.append(ours / last.prompt_tps)
                print(f"{answer.usage.prompt_tokens} tokens: {ours:8.1f} tokens/s, mlx-lm {last.prompt_tps:8.1f}, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


def concurrent(args: argparse.Namespace) -> None:
    """Tokens/s of many streams together, in turn with mlx-lm's own server on the same model."""
    with random_model(args, busy=False) as path, target(argparse.Namespace(url=None, kind=None, model=path)) as ours:
        with (peer(path) if not args.url else contextlib.nullcontext(args.url)) as theirs:
            def measure(url: str, api: str, count: int, run: str) -> float:
                bodies = [{"model": path, "max_tokens": args.tokens, "temperature": 0, "messages": [
                    {"role": "user", "content": f"stream {n} of {run}"}]} for n in range(count)]
                with ThreadPoolExecutor(count) as pool:
                    answers = list(pool.map(lambda body: ask(url, api, body), bodies))
                return sum(a.tokens for a in answers) / max(a.first + a.rest for a in answers)

            against, alone = [], []
            for run in range(args.runs + 1):
                one, many = (measure(ours, "messages", count, f"{run} {count}") for count in (1, args.streams))
                other = measure(theirs, "chat", args.streams, f"{run}")
                if run:  # the first one warms up
                    against.append(many / other)
                    alone.append(many / one)
                    print(f"{args.streams} streams {many:8.1f} tokens/s, one alone {one:8.1f}, the other server {other:8.1f}; "
                          f"ratios {alone[-1]:.2f} and {against[-1]:.2f}")
            print(f"median: {statistics.median(alone):.2f} times one stream, {statistics.median(against):.2f} times the other server")


@contextlib.contextmanager
def peer(path: str) -> Iterator[str]:
    """mlx-lm's own server with a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "mlx_lm", "server", "--model", path, "--port", str(port)],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("mlx_lm server does not start") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def contended(args: argparse.Namespace) -> None:
    """How long a short request waits while long prompts are read, in chunks of those prompts."""
    from engine import Runtime

    def prompt(words: int, salt: str) -> dict:
        return {"model": args.model, "max_tokens": 2, "messages": [{"role": "user", "content": f"{salt} " + "read " * words}]}

    with target(args) as url, ThreadPoolExecutor(8) as pool:
        unit = ask(url, args.api, prompt(args.prompt // 8, "unit")).prompt / (args.prompt // 8)  # tokens a word
        words = int(args.prompt / unit)
        for name, count, headers in (("a long prompt", 1, {}), ("four of low priority", 4, {"x-priority": "low"})):
            waits = []
            for run in range(args.runs):
                long = [pool.submit(ask, url, args.api, prompt(words, f"{name} {run} {n}"), headers) for n in range(count)]
                started = time.perf_counter()
                while time.perf_counter() - started < 1 or not running(url):  # all of them have arrived
                    time.sleep(0.05)
                mine = {"x-priority": "high"} if headers else {}
                short = ask(url, args.api, prompt(int(50 / unit), f"short {name} {run}"), mine)
                if all(request.done() for request in long):
                    raise SystemExit("the long prompts were read before the short one came: give a longer --prompt")
                answers = [request.result() for request in long]
                tokens, seconds = sum(a.prompt - a.reused for a in answers), max(a.first for a in answers)
                chunk = seconds / tokens * Runtime.CHUNK
                waits.append(short.first / chunk)
                print(f"{name}: a request of {short.prompt} tokens waited {short.first:.2f} s, a chunk takes {chunk:.2f} s")
            print(f"behind {name}: {statistics.median(waits):.2f} chunks (median), at most {max(waits):.2f}")


def running(url: str) -> bool:
    """Whether a server of ours is busy; others do not tell."""
    from soak import figure

    try:
        return figure(urlsplit(url).port, "running_requests") > 0
    except (OSError, TypeError):
        return True


def soak(args: argparse.Namespace) -> None:
    """64 connections and 1,000 requests of all dialects, a fifth of which hang up."""
    from soak import Soak, memory

    with target(args, "--max-queue", "128") as url:
        port = urlsplit(url).port
        trouble = Soak(port, 64, [], requests=1000)
        trouble.learn()
        before = memory(port, [])
        started = time.perf_counter()
        report = trouble.run()
        seconds, after = time.perf_counter() - started, memory(port, [])
        print(f"{sum(report.done.values())} requests in {seconds:.0f} s: {dict(report.done)}")
        print(f"{len(report.wrong)} wrong or stuck {report.wrong[:3]}")
        print(f"memory, prompt cache emptied: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before - 1:+.1%})")
        print(f"GET /api/version within {report.slowest_version * 1000:.0f} ms (99 of 100), {len(report.version)} times")


@contextlib.contextmanager
def random_model(args: argparse.Namespace, busy: bool) -> Iterator[str]:
    """The model named, or one of random weights that has no way to stop early: `busy`, large enough that its arithmetic takes
    the time, else as fast as can be, to count tokens."""
    from models import CONFIGS, build_model

    if args.model != "demo":
        yield args.model
        return
    kind = args.kind or "qwen3"
    with tempfile.TemporaryDirectory() as folder:
        width = 512 if busy else 64
        size = {"num_hidden_layers": 8, "head_dim": 64} if busy else {
            "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
        config = {**CONFIGS[kind], **size, "hidden_size": width, "intermediate_size": 3 * width, "max_position_embeddings": 131072}
        if "layer_types" in config:
            config["layer_types"] = (config["layer_types"] * 2)[:config["num_hidden_layers"]]
        config["mlp_only_layers"] = list(range(config["num_hidden_layers"]))
        yield str(build_model(kind, Path(folder) / "random", config=config))


def render(args: argparse.Namespace) -> None:
    from engine import Library, Line, PrefixCache, Request, Tongue

    local = Library([]).resolve(args.model, trusted=True)
    requests = []
    for body in made_up_trace(args.turns):
        if len(body.get("tools") or []) == 5:
            chat = as_chat({**body, "model": args.model, "max_tokens": 1})
            for message in chat["messages"]:
                for call in message.get("tool_calls") or []:
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            requests.append(Request(args.model, chat["messages"], tools=chat["tools"]))
    *_, first, second, third = requests[:-args.runs]
    Tongue(local).prompt(first)
    tongue, prefixes = Tongue(local), PrefixCache(lambda: 1 << 40)
    cold, _ = timed(lambda: tongue.prompt(first))
    for request in (second, third):  # turns of other kinds than the first
        prefixes.put(Line(tongue.prompt(request).tokens, []))
    grown, again = [], []
    for request in requests[-args.runs:]:
        gc.collect()
        for ratios in (grown, again):  # with the turn's new text to tokenise, and without
            seconds, (_, found) = timed(lambda: prefixes.find("", tongue.prompt(request).tokens))
            ratios.append(seconds / cold)
        prefixes.put(Line(tongue.prompt(request).tokens, []))
        print(f"{found} tokens: cold {cold * 1000:.0f} ms, with a new turn {grown[-1]:.3f} of that, once more {again[-1]:.3f}")
    print(f"median ratios {statistics.median(grown):.3f} and {statistics.median(again):.3f}")


def timed(call: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(
        "reuse", "loop", "decode", "prefill", "render", "concurrent", "contended", "soak"))
    parser.add_argument("--url", help="another server")
    parser.add_argument("--api", choices=("messages", "chat"), default="messages")
    parser.add_argument("--model", default="demo", help="a name that the server knows, or a path")
    parser.add_argument("--trace", metavar="FILE", help="a recorded session; without it one is made up")
    parser.add_argument("--turns", type=int, default=20, help="turns of a made-up session")
    parser.add_argument("--max-tokens", type=int, default=8, help="length of the answers to a trace")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to decode, or words to prefill")
    parser.add_argument("--streams", type=int, default=8, help="streams at once")
    parser.add_argument("--prompt", type=int, default=13000, help="tokens of a long prompt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kind", choices=("qwen3", "llama_sliding", "hybrid"),
                        help="a model of random weights with plain, sliding or recurrent layers instead of the built-in one")
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
