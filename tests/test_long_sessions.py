"""Sessions as coding agents have them: what of a prompt is read again, what memory they take, and
what clients see meanwhile."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, kinds
from models import CONFIGS, OPAQUE, build_model
from schemas import obj, tool
from test_engine import REREAD, SYSTEM, answer, cold, user

from _mlx_server.front import answers
from _mlx_server.inference.prompt.control_tokens import unescape
from _mlx_server.wire.anthropic import AnthropicMessages
from engine import Engine, Generation, Request, Sampling, Thinking, Tick

READ = tool("Read", obj(path={"enum": ["a.txt", "b.txt"]}))
WRITE = tool("Write", obj(path={"enum": ["a.txt", "b.txt"]}, text={"enum": ["x"]}))
EDITS = int(os.environ.get("EDITS", "40"))  # of a conversation, by its client
# Small enough that 128,000 tokens are read within a minute
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
NARROW |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 200_000}
NARROW |= {"linear_num_value_heads": 1, "linear_num_key_heads": 1, "mlp_only_layers": [0, 1]}
NEVER_ENDS = Sampling(temperature=0.0, logit_bias={0: -100.0, 2: -100.0})


def narrow(kind: str, path: Path) -> str:
    """A small model of one layer or, where a kind has two of them, of two."""
    layers = 1 + (kind in ("hybrid", "llama_sliding"))
    types = ["sliding_attention", "full_attention"] if kind == "llama_sliding" else None
    more = {"num_hidden_layers": layers, **({"layer_types": types} if types else {})}
    return str(build_model("", path, config={**CONFIGS[kind], **NARROW, **more}))


def call(engine: Engine, messages: list[dict], **fields) -> tuple[dict, Generation]:
    """A turn that is one call: the assistant's message, and its generation."""
    fields = {"tools": [READ], "tool_choice": "Read", "max_tokens": 60, **fields}
    fields["parallel_tool_calls"] = False
    generation = engine.chat(messages, **fields)
    list(generation)
    [(id, name, arguments)] = generation.sequence.calls
    function = {"name": name, "arguments": arguments}
    calls = [{"id": id, "type": "function", "function": function}]
    said = {"role": "assistant", "content": generation.sequence.visible, "tool_calls": calls}
    return said, generation


def result(message: dict, text: str) -> dict:
    [one] = message["tool_calls"]
    name = one["function"]["name"]
    return {"role": "tool", "tool_call_id": one["id"], "name": name, "content": text}


def read_anew(generation: Generation) -> int:
    return generation.usage.prompt_tokens - generation.usage.cached_tokens


# ------------------------------------------------------------------ reuse


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("llama_sliding"))
def test_as_much_is_reused_with_tools_and_behind_results_as_without(folder: Path, kind: str):
    with Engine(str(folder / kind)) as engine:
        asked = [SYSTEM, user("begin " * 100)]
        called, _ = call(engine, asked)
        for messages, tools in (
            (asked, []),
            (asked, [READ]),
            ([*asked, called, result(called, "nothing " * 50)], [READ]),
        ):
            answer(engine, messages, tools=tools)
            said, again = answer(engine, messages, tools=tools)
            assert read_anew(again) <= REREAD
            read = again.usage.prompt_tokens + again.usage.completion_tokens
            follow_up = [*messages, {"role": "assistant", "content": said}, user("go on")]
            _, later = answer(engine, follow_up, tools=tools)
            assert later.usage.cached_tokens >= read - REREAD


@pytest.mark.slow
def test_sixty_short_calls_behind_128_000_tokens_read_only_what_is_new(tmp_path: Path):
    with Engine(narrow("hybrid", tmp_path / "m")) as engine:
        messages = [SYSTEM, user("\u00e4\n" * 43_000)]  # characters of three tokens
        known = 0
        for turn in range(60):
            message, generation = call(engine, messages)
            assert generation.usage.prompt_tokens > 128_000
            assert generation.usage.cached_tokens >= known - REREAD
            known = generation.usage.prompt_tokens + generation.usage.completion_tokens
            before, messages = messages, [*messages, message, result(message, f"result {turn}")]
            if turn % 20 == 7:  # the turn is asked for once more, in other words
                other = [*before[:-1], {**before[-1], "content": "another one"}]
                assert read_anew(call(engine, other)[1]) < 200
        warm, generation = answer(engine, messages, tools=[READ])
        assert read_anew(generation) < 100
        assert warm == cold(engine, messages, tools=[READ])


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_branches_that_part_near_their_end_are_both_kept(tmp_path: Path, kind: str):
    with Engine(narrow(kind, tmp_path / "m")) as engine:
        shared = [SYSTEM, user("\u00e4\n" * 9_000)]
        said, _ = answer(engine, shared)
        shared += [{"role": "assistant", "content": said}]
        branches = [[*shared, user(f"{n} " + "\u00e4\n" * 300)] for n in range(2)]
        grown = [0, 0]
        for turn in range(5):
            for number, messages in enumerate(branches):
                said, generation = answer(engine, messages)
                if turn or number:
                    # What both share at first, and then all of the branch's own
                    least = grown[number] or 27_000
                    assert generation.usage.cached_tokens >= least - REREAD, (turn, number)
                grown[number] = generation.usage.prompt_tokens + generation.usage.completion_tokens
                messages += [{"role": "assistant", "content": said}, user(f"turn {turn}")]
        assert answer(engine, branches[0])[0] == cold(engine, branches[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_what_was_read_before_does_not_change_a_cold_answer(folder: Path, kind: str):
    with Engine(str(folder / kind)) as engine:
        said = [answer(engine, [user(letter * 900)], max_tokens=40)[0] for letter in "abc"]
        assert answer(engine, [user("c" * 900)], max_tokens=40)[0] == said[2]
        assert cold(engine, [user("c" * 900)], max_tokens=40) == said[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_two_lists_of_tools_that_alternate_keep_a_state_each(folder: Path, kind: str):
    with Engine(str(folder / kind)) as engine:
        messages = [SYSTEM, user("begin " * 200)]
        known = {"Read": 0, "Write": 0}
        for turn in range(6):
            for tools, name in (([READ, WRITE], "Read"), ([WRITE], "Write")):
                message, generation = call(engine, messages, tools=tools, tool_choice=name)
                # The beginning of the forced call is no part of the conversation
                assert generation.usage.cached_tokens >= known[name] - REREAD - 30
                known[name] = generation.usage.prompt_tokens
            messages += [message, result(message, f"result {turn}")]


@pytest.mark.slow
def test_a_system_message_behind_each_result_stays_where_it_is(serve: Callable, folder: Path):
    reminder = {"role": "system", "content": "Remember to be brief."}
    name, schema = READ["function"]["name"], READ["function"]["parameters"]
    messages: list[dict] = [user("begin " * 200)]
    with Engine(str(folder / "hybrid")) as engine:
        server, known = serve(engine), 0
        for turn in range(6):
            body = {
                "model": "default",
                "max_tokens": 60,
                "system": SYSTEM["content"],
                "messages": messages,
                "tools": [{"name": name, "input_schema": schema}],
                "tool_choice": {"type": "tool", "name": name},
            }
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            connection.request("POST", "/v1/messages", json.dumps(body))
            said = json.loads(connection.getresponse().read())
            connection.close()
            usage, [block] = said["usage"], said["content"]
            assert usage["cache_read_input_tokens"] >= known - REREAD
            known = usage["cache_read_input_tokens"] + usage["input_tokens"]
            known += usage["output_tokens"]
            seen = {"type": "tool_result", "tool_use_id": block["id"], "content": f"result {turn}"}
            messages += [
                {"role": "assistant", "content": [block]},
                {"role": "user", "content": [seen]},
                reminder,
            ]


# ------------------------------------------------------------------ the disk


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, dtype",
    [
        *[(kind, dtype) for kind in CONFIGS for dtype in ("float16", "bfloat16")],
        *[("qwen3", dtype) for dtype in ("float32", "4 bits", "8 bits")],
        ("qwen2", "8 bits"),  # whose config tells of larger heads than it has: it stays as it is
    ],
)
def test_any_length_of_any_type_comes_back_from_the_disk(tmp_path: Path, kind: str, dtype: str):
    import mlx.core as mx

    config = OPAQUE if kind == "opaque" else {**CONFIGS[kind], "head_dim": 32}
    path = build_model("", tmp_path / "m", config=config)
    bits = int(dtype[0]) if "bits" in dtype else None
    if bits is None:
        file = str(path / "model.safetensors")
        weights = {name: one.astype(getattr(mx, dtype)) for name, one in mx.load(file).items()}
        mx.save_safetensors(file, weights, {"format": "mlx"})
    prompts = [[5 + n % 300 for n in range(length)] for length in (1, 2, 63, 65, 255, 257, 1031)]

    def said(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
        generation = engine.submit(Request("m", prompt=prompt, max_tokens=7))
        list(generation)
        return generation.sequence.tokens, generation.usage.cached_tokens

    with Engine(str(path), kv_bits=bits, cache_dir=tmp_path / "kept") as engine:
        first = [said(engine, prompt)[0] for prompt in prompts]
    with Engine(str(path), kv_bits=bits, cache_dir=tmp_path / "kept") as engine:
        again = [said(engine, [*tokens, 9, 8, 7]) for tokens in first]
    assert [read for _, read in again] == [len(tokens) for tokens in first]
    with Engine(str(path), kv_bits=bits) as engine:
        unread = [said(engine, [*tokens, 9, 8, 7])[0] for tokens in first]
    assert unread == [tokens for tokens, _ in again]


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_a_budget_smaller_than_one_session_says_so_and_serves_it(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    messages = [SYSTEM, user("long " * 600)]
    with Engine(str(folder / "qwen3")) as engine:
        expected, _ = answer(engine, messages)
        size = engine.pool.prefixes.nbytes
    assert "the prompt cache has" not in caplog.text
    with Engine(str(folder / "qwen3"), cache_limit=size // 2) as engine:
        for _ in range(2):
            assert answer(engine, messages)[0] == expected
            assert 0 < engine.pool.prefixes.nbytes <= size // 2
    assert "the prompt cache has" in caplog.text


@pytest.mark.slow
def test_memory_is_back_after_prompts_of_up_to_128_000_tokens(tmp_path: Path):
    import mlx.core as mx

    with Engine(narrow("qwen3", tmp_path / "m"), cache_limit=1 << 20) as engine:
        list(engine.submit(Request("m")))
        before = mx.get_active_memory()
        for length in (1_000, 2_000, 4_000, 8_000, 16_000, 64_000, 128_000):
            prompt = [5 + (n + length) % 300 for n in range(length)]
            list(engine.submit(Request("m", prompt=prompt, max_tokens=4)))
        list(engine.submit(Request("m")))  # by now the last one has been filed
        held = mx.get_active_memory() - before
        assert held <= 1.1 * engine.pool.prefixes.nbytes + (1 << 18) < (2 << 20)


@pytest.mark.slow
def test_a_long_thought_holds_no_buffer_for_each_token(tmp_path: Path):
    """Metal allows a process about half a million buffers."""
    import mlx.core as mx

    with Engine(narrow("qwen3", tmp_path / "m")) as engine:
        list(engine.submit(Request("m")))
        token = engine.pool.runners["m"].state_size.token
        generation = engine.submit(
            Request("m", [user("think")], max_tokens=10_000, sampling=NEVER_ENDS, logprobs=None)
        )
        seen: dict[int, int] = {}  # the bytes in use, by the tokens of the answer
        for event in generation:
            if not isinstance(event, Tick):
                seen[generation.usage.completion_tokens] = mx.get_active_memory()
        assert generation.usage.completion_tokens == 10_000
        middle = [size - token * at for at, size in seen.items() if 2_000 < at < 4_000]
        end = [size - token * at for at, size in seen.items() if 8_000 < at < 10_000]
        # The smallest buffer takes 16 bytes
        assert min(end) - min(middle) < 16 * 4_000


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_caches_are_smaller_alone_and_together(folder: Path, bits: int):
    import mlx.core as mx

    def held(bits: int | None) -> list[int]:
        """Bytes that the states of one conversation take, and those of three answered at once."""
        with Engine(str(folder / "qwen3"), kv_bits=bits) as engine:
            list(engine.submit(Request("qwen3")))
            sizes = [mx.get_active_memory()]
            for prompts in (["a"], ["b", "c", "d"]):
                together = [engine.chat([user(one * 2000)], max_tokens=9) for one in prompts]
                for generation in together:
                    list(generation)
                list(engine.submit(Request("qwen3")))  # by now the last one has been filed
                sizes.append(mx.get_active_memory())
            return [after - before for before, after in itertools.pairwise(sizes)]

    # Each group of 32 numbers has a scale and a bias of 32 bits each here
    most = (bits + 2) / 32 * 1.3
    assert all(small < plain * most for small, plain in zip(held(bits), held(None), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_calls_stay_whole_with_quantised_caches(folder: Path, bits: int):
    with Engine(str(folder / "qwen3"), kv_bits=bits) as engine:
        messages = [SYSTEM, user("begin " * 300)]
        for turn in range(4):
            message, generation = call(engine, messages)
            [one] = message["tool_calls"]
            assert one["function"]["arguments"]["path"] in ("a.txt", "b.txt")
            assert not turn or read_anew(generation) < 60
            messages += [message, result(message, f"result {turn}")]


@pytest.fixture(scope="module")
def opaque(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model("", tmp_path_factory.mktemp("models") / "opaque", config=OPAQUE))


@pytest.mark.slow
def test_caches_of_an_own_class_are_used_alone_and_kept(opaque: str, tmp_path: Path):
    messages = [SYSTEM, user("begin " * 200)]
    with Engine(opaque, cache_dir=tmp_path) as engine:
        alone = [answer(engine, f"number {n}")[0] for n in range(3)]
        together = [engine.chat(f"number {n}", max_tokens=16) for n in range(3)]
        assert ["".join(one.text()) for one in together] == alone
        said, first = answer(engine, messages)
        messages += [{"role": "assistant", "content": said}, user("go on")]
        read = first.usage.prompt_tokens + first.usage.completion_tokens
        warm, generation = answer(engine, messages)
        assert generation.usage.cached_tokens >= read - REREAD
        assert warm == cold(engine, messages)
    with Engine(opaque, cache_dir=tmp_path) as engine:
        said, generation = answer(engine, messages)
        assert said == warm and read_anew(generation) <= REREAD


@pytest.mark.slow
def test_what_caches_of_an_own_class_take_is_measured(opaque: str):
    with Engine(opaque) as engine:
        sizes = {}
        for length in (2_000, 8_000):
            list(engine.submit(Request("opaque", prompt=[5] * length, max_tokens=1)))
            [entry] = [one for one in engine.pool.prefixes.entries() if len(one.tokens) >= length]
            sizes[length] = sum(layer.nbytes for layer in entry.cache)
        state = engine.pool.runners["opaque"].state_size
        assert state.token == pytest.approx((sizes[8_000] - sizes[2_000]) / 6_000, rel=0.05)
        assert sizes[8_000] < state.nbytes(8_000) < 1.3 * sizes[8_000]


# ------------------------------------------------------------------ what a client sees


def frames(port: int, **body: object) -> Iterator[dict]:
    """The events of a streamed answer of the Messages API."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/v1/messages", json.dumps({"stream": True, **body}))
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    connection.close()


@pytest.mark.slow
def test_none_of_twenty_agents_and_a_session_waits_long_for_an_event_that_counts(
    serve: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Claude Code gives up after 300 s in which only pings came. The server sends something else
    after half of that; here its clocks run a hundred times faster, and pings are counted."""
    monkeypatch.setattr(answers, "PING_AFTER", answers.PING_AFTER / 100)
    monkeypatch.setattr(AnthropicMessages, "LULL", AnthropicMessages.LULL / 100)
    monkeypatch.setattr(Generation, "TICK", 0.01)
    most = AnthropicMessages.LULL / answers.PING_AFTER + 1
    seen: dict[int, Counter[str]] = {}

    def agent(number: int) -> None:
        counts = seen[number] = Counter()
        length = 6_000 if number == 0 else 1_500
        prompt = [user(f"agent {number} " + "x" * length)]
        for event in frames(server.port, model="default", max_tokens=12, messages=prompt):
            counts[event["type"]] += 1
            counts["in a row"] = counts["in a row"] + 1 if event["type"] == "ping" else 0
            counts["longest"] = max(counts["longest"], counts["in a row"])

    with Engine(str(folder / "hybrid")) as engine:
        server = serve(engine)
        threads = [threading.Thread(target=agent, args=(number,)) for number in range(21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * PATIENCE)
    assert [counts["message_stop"] for counts in seen.values()] == [1] * 21
    assert max(counts["longest"] for counts in seen.values()) <= most
    # Some had to wait so long that the pings alone would not have been enough
    assert max(counts["ping"] for counts in seen.values()) > most


@pytest.mark.slow
def test_thinking_that_the_client_does_not_want_to_see_is_not_silence(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "PING_AFTER", 0.0)
    body = {"max_tokens": 60, "messages": [user("think then say hello")]}
    thinking = {"type": "adaptive", "display": "omitted"}
    with Engine("demo") as engine:
        thoughts = [one for one in engine.chat("think then say hello") if isinstance(one, Thinking)]
        server = serve(engine)
        events = list(frames(server.port, model="demo", thinking=thinking, **body))
    types = [event["type"] for event in events]
    start, stop = types.index("content_block_start"), types.index("content_block_stop")
    assert len(thoughts) > 3 and types[start:stop].count("ping") > 3


def edited(messages: list[dict], chance: random.Random) -> tuple[list[dict], str]:
    """A conversation with one message changed, or dropped with all behind it but the last one, and
    the words that have come in."""
    words = f"changed {chance.randrange(10**9)}"
    at = chance.randrange(len(messages) - 1)
    changed = {**messages[at], "content": words}
    if chance.random() < 0.2 and changed["role"] == "user":
        return [*messages[:at], changed], words
    return [*messages[:at], changed, *messages[at + 1 :]], words


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "llama_sliding", "hybrid"])
def test_what_a_client_changes_is_answered_as_if_it_had_never_been_otherwise(
    kind: str, folder: Path
):
    """The reference has an empty cache for each request, and reads the tokens that the other one
    has read in part before."""
    chance, reused = random.Random(kind), 0
    messages = [{"role": "system", "content": SYSTEM["content"][:150]}]
    with Engine(str(folder / kind)) as engine, Engine(str(folder / kind), cache_limit=1) as fresh:
        for turn in range(6):
            messages.append(user(f"Say {turn}. " * chance.randrange(2, 9)))
            said, _ = answer(engine, messages, max_tokens=3)
            messages.append({"role": "assistant", "content": said})
        messages.append(user("And now?"))
        renderer = fresh.renderer(fresh.default)
        template = renderer.template
        for _ in range(EDITS):
            changed, words = edited(messages, chance)
            said, generation = answer(engine, changed, max_tokens=3)
            tokens = generation.sequence.prompt.tokens
            cold = fresh.submit(Request("default", prompt=tokens, max_tokens=3))
            assert "".join(cold.text()) == said
            assert cold.usage.cached_tokens == 0
            reused += generation.usage.cached_tokens > 0
            # Behind the change stands what the template makes of it, which knows of nothing else
            anew = template.render(template.escape_messages(changed), [], {}, generation=True)
            read = renderer.decode(tokens)
            assert read.rpartition(words)[2] == unescape(anew).rpartition(words)[2] != ""
    assert reused > EDITS / 2
