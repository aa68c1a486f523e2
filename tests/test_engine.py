"""The engine on real random-weight models of each cache class: caching, sampling, limits,
cancelling, failing, closing."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import kinds
from models import CONFIGS, build_model

from _mlx_server.inference.decoding.prefill import PromptReader
from engine import (
    Done,
    Engine,
    EngineClosed,
    EngineError,
    Generation,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
    Request,
    Sampling,
    Text,
    Tick,
)

ROOT = Path(__file__).parent.parent
# Tokens: layers that cannot be cut are restored at the end of the conversation, before the
# generation prompt
REREAD = 8
SYSTEM = {"role": "system", "content": "You are a careful tester. " * 40}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module", params=kinds("llama_sliding"))
def engine(request: pytest.FixtureRequest, folder: Path):
    with Engine(str(folder / request.param)) as engine:
        yield engine


def answer(engine: Engine, messages: str | list[dict], **fields) -> tuple[str, Generation]:
    fields.setdefault("max_tokens", 16)
    generation = engine.chat(messages, **fields)
    return "".join(generation.text()), generation


def cold(engine: Engine, *args, **fields) -> str:
    engine.unload(engine.default.name)
    return answer(engine, *args, **fields)[0]


def test_a_resent_prompt_is_not_prefilled_again(engine: Engine):
    messages = [SYSTEM, user("resend")]
    first, _ = answer(engine, messages)
    again, generation = answer(engine, messages)
    assert again == first
    assert (
        generation.usage.cached_tokens
        == generation.cached_tokens
        >= generation.usage.prompt_tokens - REREAD
    )


def test_tokens_before_the_conversation_are_read_before_it_and_found_again(engine: Engine):
    first = engine.chat("one", max_tokens=9)
    *_, done = first
    assert (
        done.tokens[: first.prompt_tokens] == list(first.sequence.prompt.tokens)
        and len(done.tokens) == first.prompt_tokens + 9
    )
    follow_up = engine.chat([user("two")], context=done.tokens, max_tokens=9)
    *events, last = follow_up
    assert follow_up.usage.cached_tokens == len(done.tokens)
    engine.unload(engine.default.name)
    prompt = [*done.tokens, *engine.chat([user("two")], max_tokens=0).sequence.prompt.tokens]
    *_, again = engine.submit(Request("default", prompt=prompt, max_tokens=9))
    assert last.tokens == again.tokens and last.tokens[: len(prompt)] == prompt


def test_a_continued_conversation_prefills_only_what_is_new_and_answers_as_if_cold(engine: Engine):
    messages = [SYSTEM, user("one")]
    text, generation = answer(engine, messages)
    messages += [{"role": "assistant", "content": text}, user("two")]
    warm, follow_up = answer(engine, messages)
    # Random tokens do not re-tokenise as they were generated: only because they are remembered is
    # the answer reused.
    assert (
        follow_up.usage.cached_tokens
        == generation.usage.prompt_tokens + generation.usage.completion_tokens
    )
    assert warm == cold(engine, messages)


@pytest.mark.slow
def test_conversations_share_the_system_prompt_and_answers_stay_those_of_a_cold_run(engine: Engine):
    answer(engine, [SYSTEM, user("first conversation")])
    warm, other = answer(engine, [SYSTEM, user("quite another one")])
    assert other.usage.cached_tokens > 0.9 * len(
        engine.renderer(engine.default).encode(SYSTEM["content"])
    )
    assert warm == cold(engine, [SYSTEM, user("quite another one")])


@pytest.mark.slow
def test_a_cancelled_prefill_keeps_what_it_has_and_resuming_changes_nothing(engine: Engine):
    messages = [user("word " * 700)]
    expected = cold(engine, messages)
    engine.unload(engine.default.name)
    generation = engine.chat(messages, max_tokens=4)
    sequence = generation.sequence
    while sequence.entry is None or not sequence.entry.tokens:  # until the first chunk is done
        next(generation)
    generation.cancel()
    text, resumed = answer(engine, messages)
    assert text == expected
    assert resumed.usage.cached_tokens >= PromptReader.CHUNK


def test_a_model_with_experts_reads_large_chunks_while_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, tokens in (("CHUNK", 32), ("LARGE", 128), ("DEEP", 256)):
        monkeypatch.setattr(PromptReader, name, tokens)
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    with Engine(
        str(build_model("", tmp_path / "moe", config={**CONFIGS["qwen3"], **experts}))
    ) as engine:
        answer(engine, "loads the model")
        runtime, sizes = engine.pool.runners["moe"], []
        model = runtime.weights.model

        def measured(tokens, cache):
            if tokens.shape[1] > 1:
                sizes.append(tokens.shape[1])
            return model(tokens, cache=cache)

        runtime.weights.model = runtime.decode_batch.model = measured
        measured.layers = model.layers
        list(engine.submit(Request("moe", prompt=[5] * 300, max_tokens=1)))
        assert sizes == [128, 128, 32, 12]
        running = engine.submit(Request("moe", prompt=[6], max_tokens=4000))
        next(iter(running.text()))
        sizes.clear()
        list(engine.submit(Request("moe", prompt=[7] * 60, max_tokens=1)))
        assert sizes == [32, 28]


@pytest.mark.slow
def test_what_is_too_much_for_the_gpu_is_tried_in_smaller_chunks_and_leaves_nothing(folder: Path):
    with Engine(str(folder / "qwen2")) as engine:
        expected = cold(engine, "deep " * 250)
        engine.unload(engine.default.name)
        answer(engine, "loads the model")
        runtime = engine.pool.runners[engine.default.name]
        model = runtime.weights.model

        def watched(tokens, cache):
            if cache[0].offset > 300 and tokens.shape[1] > 128:
                raise RuntimeError(
                    "[METAL] Command buffer execution failed: Impacting Interactivity"
                )
            return model(tokens, cache=cache)

        runtime.weights.model, watched.layers = watched, model.layers
        for _ in range(2):
            with pytest.raises(EngineError, match="try again"):
                answer(engine, "deep " * 250)
        text, generation = answer(engine, "deep " * 250)
        assert text == expected and generation.usage.cached_tokens < REREAD


@pytest.mark.slow
def test_a_twin_of_a_running_request_is_not_prefilled_again(engine: Engine):
    messages = [user("twins " * 300)]
    expected = cold(engine, messages)
    engine.unload(engine.default.name)
    first = engine.chat(messages, max_tokens=3000)
    while not isinstance(next(first), Text):
        pass
    text, second = answer(engine, messages)
    first.cancel()
    assert second.usage.cached_tokens >= second.usage.prompt_tokens - REREAD
    assert text == expected


def test_a_seed_gives_the_same_text_alone_and_in_company(engine: Engine):
    sampling = Sampling(
        temperature=1.0,
        top_p=0.95,
        top_k=40,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.2,
        seed=5,
    )
    alone, _ = answer(engine, "dice", sampling=sampling)
    company = [
        engine.chat(f"guest {n}", max_tokens=24, sampling=Sampling(temperature=1.0, seed=n))
        for n in range(3)
    ]
    seeded = engine.chat("dice", max_tokens=16, sampling=sampling)
    assert "".join(seeded.text()) == alone
    assert answer(engine, "dice", sampling=Sampling(temperature=1.0, seed=6))[0] != alone
    for guest in company:
        guest.cancel()


def test_usage_adds_up_and_the_limit_is_reported(engine: Engine):
    events = list(engine.chat("count", max_tokens=7))
    done = events[-1]
    assert isinstance(done, Done) and done.reason == "length"
    assert done.usage.completion_tokens == 7
    assert done.usage.prompt_tokens == engine.count_tokens(
        Request(engine.default.name, [user("count")])
    )
    assert done.usage.total_seconds >= done.usage.prefill_seconds + done.usage.decode_seconds


def test_max_tokens_zero_only_fills_the_cache(engine: Engine):
    text, generation = answer(engine, "prewarm me", max_tokens=0)
    assert text == "" and generation.usage.completion_tokens == 0
    assert (
        answer(engine, "prewarm me")[1].usage.cached_tokens
        >= generation.usage.prompt_tokens - REREAD
    )


def test_an_empty_request_loads_the_model_and_unload_frees_it(engine: Engine):
    name = engine.default.name
    engine.unload(name)
    assert engine.loaded() == []
    assert list(engine.submit(Request(name)))[-1].reason == "load"
    assert [loaded.model.name for loaded in engine.loaded()] == [name]


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(folder: Path):
    with Engine(str(folder / "qwen2"), context=64) as engine:
        with pytest.raises(PromptTooLong, match=r"prompt is too long: \d+ tokens > 64 maximum"):
            engine.chat("word " * 100)
        events = list(engine.chat("hi", sampling=Sampling(temperature=1.0, seed=1)))
        assert events[-1].reason in ("context", "stop")
        assert events[-1].usage.prompt_tokens + events[-1].usage.completion_tokens <= 64


@pytest.mark.slow
def test_models_are_swapped_in_the_order_of_requests_when_one_may_be_loaded(folder: Path):
    with Engine(models_dirs=[folder], max_loaded=1) as engine:
        names = ["qwen2", "hybrid", "qwen2", "llama_sliding"]
        generations = [engine.submit(Request(name, [user("hi")], max_tokens=3)) for name in names]
        assert [list(g)[-1].reason for g in generations] == ["length"] * 4
        assert [loaded.model.name for loaded in engine.loaded()] == ["llama_sliding"]


@pytest.mark.slow
def test_keep_alive_zero_unloads_after_the_answer(folder: Path):
    with Engine(models_dirs=[folder]) as engine:
        list(engine.submit(Request("qwen2", [user("hi")], max_tokens=2, keep_alive=0)))
        engine.unload("hybrid")  # returns after a step of the engine, which has unloaded by then
        assert engine.loaded() == []


@pytest.mark.slow
def test_a_broken_model_fails_its_own_requests_and_can_be_tried_again(folder: Path, tmp_path: Path):
    broken = build_model("qwen2", tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with Engine(models_dirs=[folder, tmp_path]) as engine:
        healthy = engine.submit(Request("qwen2", [user("hi")], max_tokens=200))
        with pytest.raises(ModelLoadError, match="broken") as failure:
            list(engine.submit(Request("broken", [user("hi")])))
        assert str(tmp_path) not in str(failure.value)
        assert list(healthy)[-1].usage.completion_tokens > 0
        (broken / "model.safetensors").write_bytes(weights)
        assert (
            list(engine.submit(Request("broken", [user("hi")], max_tokens=2)))[-1].reason
            == "length"
        )


def test_a_failing_step_fails_its_request_and_nothing_else(engine: Engine):
    bad = Request(
        engine.default.name, [user("bad")], max_tokens=4, sampling=Sampling(temperature="hot")
    )
    with pytest.raises(EngineError, match="try again"):
        list(engine.submit(bad))
    assert answer(engine, "good")[1].usage.completion_tokens


def test_an_unknown_model_names_what_is_installed(folder: Path):
    refused = pytest.raises(ModelNotFound, match="llama_sliding")
    with Engine(models_dirs=[folder]) as engine, refused:
        engine.submit(Request("no-such-model:7b", [user("hi")]))


def test_cancelling_ends_the_iteration_at_once(engine: Engine):
    generation = engine.chat("endless", max_tokens=4000)
    for event in generation:
        if isinstance(event, Text):
            generation.cancel()
    assert not engine.submit(Request(engine.default.name)).prompt_tokens  # the engine goes on


def test_ticks_come_while_nothing_else_does(folder: Path):
    with Engine(str(folder / "qwen2")) as engine:
        generation = engine.chat("word " * 4000, max_tokens=1)
        assert any(isinstance(event, Tick) for event in generation)


def test_closing_ends_running_work_with_an_error(folder: Path):
    engine = Engine(str(folder / "qwen2"))
    generation = engine.chat("endless", max_tokens=30000)
    closer = threading.Thread(target=engine.close)
    with pytest.raises(EngineClosed):
        for event in generation:
            if isinstance(event, Text) and closer.ident is None:
                closer.start()
    closer.join()
    with pytest.raises(EngineClosed):
        engine.chat("too late")


@pytest.mark.parametrize("module", ["engine", "mlx_server"])
def test_importing_the_engine_or_the_server_is_cheap(module: str):
    slow = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "llguidance"}
    commands = {"agents", "commands", "doctor", "launch", "pulling"}
    slow |= {f"_mlx_server.front.{one}" for one in commands}
    answers = {"decoding.runner", "output.families", "output.parser", "prompt.renderer"}
    slow |= {f"_mlx_server.inference.{one}" for one in {"catalog.hub", *answers}}
    slow |= {"importlib.metadata", "logging.handlers", "pickle", "platform", "plistlib"}
    script = f"import sys, {module}; print(sorted({slow} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout.replace("'", '"')) == []


@pytest.mark.slow
def test_a_process_that_used_the_engine_exits_cleanly(folder: Path):
    script = f"""
from engine import Engine, Sampling
engine = Engine({str(folder / "llama_sliding")!r})
answer = engine.chat("hi", max_tokens=3, sampling=Sampling(temperature=1.0, seed=1))
print(len("".join(answer.text())) > 0)
engine.close()
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, "True"), out.stderr


def test_a_gap_is_filled_with_the_tokenizers_own_tokens(tmp_path: Path):
    path = build_model("qwen2", tmp_path / "coder")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    before, fills, after = tokenizer["added_tokens"][-3:]
    for token, mark in (
        (before, "<|fim_prefix|>"),
        (fills, "<|fim_middle|>"),
        (after, "<|fim_suffix|>"),
    ):
        token["content"] = mark
        settings.setdefault("added_tokens_decoder", {})[str(token["id"])] = {
            key: value for key, value in token.items() if key != "id"
        }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with Engine(str(path)) as engine:
        assert "insert" in engine.resolve("coder").capabilities
        gap = engine.submit(Request("coder", prompt="def f(", suffix="return x", max_tokens=1))
        spelled = "<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>"
        assert (
            gap.sequence.prompt.tokens
            == engine.submit(Request("coder", prompt=spelled, max_tokens=1)).sequence.prompt.tokens
        )
        decode, tokens = gap.sequence.renderer.tokenizer.decode, gap.sequence.prompt.tokens
        assert [decode(tokens), decode(tokens[:1]), decode(tokens[-1:])] == [
            spelled,
            "<|fim_prefix|>",
            "<|fim_middle|>",
        ]
        with pytest.raises(InvalidRequest, match="cannot fill a gap"):
            engine.submit(Request("demo", prompt="a", suffix="b"))


# ------------------------------------------------------------------ the log


def test_a_long_prompt_tells_how_far_it_is(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PromptReader, "PROGRESS", 0.0)
    with caplog.at_level(logging.INFO):
        _, generation = answer(engine, "how far " * 150, max_tokens=1)
    pattern = r"\w+: prompt (\d+) %, ([\d,]+)/([\d,]+) tokens, \d+ tokens/s, \d+ s left"
    told = [re.fullmatch(pattern, line).groups() for line in caplog.messages if "tokens/s" in line]
    read, total = ([int(match[at].replace(",", "")) for match in told] for at in (1, 2))
    assert len(told) > 1 and read == sorted(set(read)) and set(total) == {generation.prompt_tokens}
    assert [int(match[0]) for match in told] == [
        100 * tokens // generation.prompt_tokens for tokens in read
    ]
