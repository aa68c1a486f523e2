"""The prefix cache: what is reused after a branch, an edit, a restart; within which bounds; and
that it changes no answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import Server, kinds
from test_engine import REREAD, ROOT, SYSTEM, answer, cold, user

from _mlx_server.inference.cache.disk_cache import DiskCache
from _mlx_server.inference.cache.prefix_cache import CacheEntry
from _mlx_server.inference.decoding.prefill import PromptReader
from engine import Engine, EngineError, Request

LONG = [SYSTEM, user("long " * 600)]


@pytest.fixture(params=[*kinds("qwen2"), pytest.param("quantised", marks=pytest.mark.slow)])
def options(request: pytest.FixtureRequest, folder: Path) -> dict:
    """What to start an engine of each cache class with."""
    quantised = request.param == "quantised"
    return {
        "model": str(folder / ("qwen3" if quantised else request.param)),
        "kv_bits": 8 if quantised else None,
    }


def lines(engine: Engine) -> list[CacheEntry]:
    """What the prefix cache holds."""
    return list(engine.pool.prefixes.entries())


def turns(engine: Engine, messages: list[dict], count: int) -> list[dict]:
    """The conversation after some more turns."""
    messages = list(messages)
    for number in range(count):
        text, _ = answer(engine, messages)
        messages += [{"role": "assistant", "content": text}, user(f"turn {number}")]
    return messages


@pytest.mark.slow
def test_a_restarted_engine_goes_on_where_the_last_one_stopped(options: dict, tmp_path: Path):
    with Engine(**options, cache_dir=tmp_path) as engine:
        messages = turns(engine, LONG, 3)
        expected = cold(engine, messages)
    with Engine(**options, cache_dir=tmp_path) as engine:
        text, generation = answer(engine, messages)
        assert text == expected
        assert generation.usage.cached_tokens >= 0.99 * generation.usage.prompt_tokens
        # Known before the weights are loaded
        assert generation.cached_tokens == generation.usage.cached_tokens


@pytest.mark.slow
def test_conversations_share_the_files_of_what_they_have_in_common(options: dict, tmp_path: Path):
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    with Engine(**options, cache_dir=tmp_path) as engine:
        answer(engine, [SYSTEM, user("one")])
        engine.unload(engine.default.name)
        one = size()
        answer(engine, [SYSTEM, user("two")])
        engine.unload(engine.default.name)
        text, generation = answer(engine, [SYSTEM, user("three")])
        assert generation.usage.cached_tokens >= 700  # the system prompt
        assert text == cold(engine, [SYSTEM, user("three")])
        if lines(engine)[0].trimmable:
            assert size() < 1.5 * one


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign", "renamed"])
def test_a_bad_file_costs_no_more_than_the_work(
    damage: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with Engine(str(folder / "hybrid"), cache_dir=tmp_path) as engine:
        expected, _ = answer(engine, LONG)
    files = sorted(tmp_path.glob("*.safetensors"))
    for path in files:
        data = bytearray(path.read_bytes())
        if damage == "torn":
            del data[len(data) // 2 :]
        elif damage == "flipped":
            data[-len(data) // 8] ^= 0x40
        elif damage == "empty":
            data.clear()
        elif damage == "foreign":
            data = bytearray(b"GGUF" + bytes(1000))
        path.write_bytes(data)
        if damage == "renamed":
            path.rename(path.with_name(f"{'0' * 32}.{path.name.split('.')[1]}.safetensors"))
    with Engine(str(folder / "hybrid"), cache_dir=tmp_path) as engine:
        text, generation = answer(engine, LONG)
        assert text == expected and generation.usage.cached_tokens == 0
    assert "is ignored" in caplog.text


@pytest.mark.slow
def test_another_model_s_files_are_left_alone(folder: Path, tmp_path: Path):
    for name in ("qwen2", "qwen3"):
        with Engine(str(folder / name), cache_dir=tmp_path) as engine:
            assert answer(engine, LONG)[1].usage.cached_tokens == 0
    with Engine(str(folder / "qwen2"), cache_dir=tmp_path) as engine:
        assert answer(engine, LONG)[1].usage.cached_tokens > 1500


@pytest.mark.slow
def test_the_disk_bound_holds_while_files_are_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit, seen = 3_000_000, []
    sync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: (seen.append(sum(p.stat().st_size for p in tmp_path.iterdir())), sync(file)),
    )
    with Engine(str(folder / "qwen3"), cache_dir=tmp_path, cache_dir_limit=limit) as engine:
        for number in range(8):
            answer(engine, [SYSTEM, user(f"number {number}" + " more" * 150)])
            engine.unload(engine.default.name)
    assert len(seen) == 9 and limit / 2 < max(seen) <= limit
    with Engine(str(folder / "qwen3"), cache_dir=tmp_path, cache_dir_limit=limit) as engine:
        # The last one is there
        assert (
            answer(engine, [SYSTEM, user("number 7" + " more" * 150)])[1].usage.cached_tokens > 1000
        )
        # And what all of them share
        assert answer(engine, [SYSTEM, user("new")])[1].usage.cached_tokens > 700


@pytest.mark.slow
def test_a_full_disk_is_survived(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with Engine(str(folder / "qwen2"), cache_dir=tmp_path) as engine:
        answer(engine, LONG)
        engine.unload(engine.default.name)
        assert answer(engine, LONG)[0]
    assert "No space left" in caplog.text and not list(tmp_path.iterdir())


def test_what_is_written_survives_a_kill(folder: Path, tmp_path: Path):
    left = tmp_path / "writing-999999999.safetensors"
    left.write_bytes(b"half a file")
    shelf = DiskCache(tmp_path, 1000)
    assert not left.exists() and shelf.nbytes == 0


@pytest.mark.slow
def test_an_edit_deep_in_history_restarts_near_it(options: dict):
    with Engine(**options) as engine:
        messages = turns(engine, [SYSTEM, user("begin " * 500)], 6)
        whole = engine.count_tokens(Request(engine.default.name, messages))
        edited = [*messages[:-3], {**messages[-3], "content": "edited"}, *messages[-2:]]
        text, generation = answer(engine, edited)
        assert generation.usage.cached_tokens > whole - 400
        assert text == cold(engine, edited)


@pytest.mark.slow
def test_the_last_words_can_be_changed(options: dict):
    with Engine(**options) as engine:
        messages = turns(engine, LONG, 2)
        answer(engine, messages)
        changed = [*messages[:-1], user("something else")]
        text, generation = answer(engine, changed)
        assert generation.usage.prompt_tokens - generation.usage.cached_tokens < 60
        assert text == cold(engine, changed)


@pytest.mark.slow
def test_a_failed_prefill_keeps_its_finished_chunks(options: dict, monkeypatch: pytest.MonkeyPatch):
    messages = [SYSTEM, user("fail " * 900)]
    with Engine(**options) as engine:
        expected = cold(engine, messages)
        engine.unload(engine.default.name)
        answer(engine, "loads the model")
        runtime = engine.pool.runners[engine.default.name]
        model = runtime.weights.model
        limit = 700 + 3 * PromptReader.CHUNK  # tokens

        def fails(tokens, cache):
            out = model(tokens, cache=cache)  # the layers have taken it up when it fails
            if max(layer.offset for layer in cache if hasattr(layer, "offset")) > limit:
                raise MemoryError("no more room")
            return out

        vars(fails).update(layers=model.layers)
        if hasattr(model, "make_cache"):
            vars(fails).update(make_cache=model.make_cache)
        monkeypatch.setattr(runtime.weights, "model", fails)
        with pytest.raises(EngineError, match="try again"):
            answer(engine, messages)
        monkeypatch.setattr(runtime.weights, "model", model)
        text, generation = answer(engine, messages)
        assert text == expected
        assert generation.usage.cached_tokens > (
            limit - 2 * PromptReader.CHUNK if lines(engine)[0].trimmable else 700
        )


@pytest.mark.slow
def test_a_conversation_that_goes_on_is_moved_and_not_copied(options: dict):
    with Engine(**options) as engine:
        messages = turns(engine, [SYSTEM, user("begin")], 2)
        line, layers = lines(engine)[0], list(lines(engine)[0].cache)
        answer(engine, messages)
        assert lines(engine) == [line]
        assert all(after is before for after, before in zip(line.cache, layers, strict=True))


@pytest.mark.slow
def test_a_warm_turn_needs_little_memory_beside_its_own_state(folder: Path):
    import mlx.core as mx

    with Engine(str(folder / "qwen3")) as engine:
        messages = turns(engine, [SYSTEM, user("begin " * 1000)], 2)
        kept, live = engine.pool.prefixes.nbytes, mx.get_active_memory()
        mx.reset_peak_memory()
        answer(engine, messages)
        assert mx.get_peak_memory() - live < kept / 2  # which is what a chunk this small takes


@pytest.mark.slow
def test_bytes_are_counted_honestly(options: dict):
    import mlx.core as mx

    with Engine(**options) as engine:
        name = engine.default.name
        list(engine.submit(Request(name)))
        empty = mx.get_active_memory()
        turns(engine, LONG, 2)
        guests = [
            engine.chat([SYSTEM, user(f"guest {n} " * (20 + 10 * n))], max_tokens=10)
            for n in range(8)
        ]
        for number, guest in enumerate(guests):
            guest.cancel() if number % 3 == 0 else list(guest)
        list(engine.submit(Request(name)))  # by now the cancelled ones have ended, too
        held, counted = mx.get_active_memory() - empty, engine.pool.prefixes.nbytes
        assert 0.9 * held < counted < 1.1 * held


@pytest.mark.slow
def test_side_requests_do_not_evict_the_main_line(options: dict):
    with Engine(**options) as engine:
        messages = turns(engine, LONG, 2)
        line = engine.pool.prefixes.nbytes
    with Engine(**options, cache_limit=int(line * 1.5)) as engine:
        messages = turns(engine, LONG, 2)
        for number in range(6):
            answer(engine, [SYSTEM, user(f"title {number} " * 100)])
            assert engine.pool.prefixes.nbytes <= line * 1.5
        _, generation = answer(engine, messages)
        assert generation.usage.cached_tokens > 0.95 * generation.usage.prompt_tokens


@pytest.mark.slow
def test_a_line_larger_than_the_bound_keeps_its_beginning(options: dict, tmp_path: Path):
    with Engine(**options, cache_dir=tmp_path) as engine:
        messages = turns(engine, [SYSTEM, user("begin " * 500)], 2)
        expected, _ = answer(engine, messages)
        size = engine.pool.prefixes.nbytes
    with Engine(**options, cache_dir=tmp_path, cache_limit=size // 2) as engine:
        for _ in range(2):
            text, generation = answer(engine, messages)
            assert text == expected
            assert 0 < engine.pool.prefixes.nbytes <= size // 2
    with Engine(**options, cache_limit=size // 2) as engine:
        expected, _ = answer(engine, messages)
        text, generation = answer(engine, messages)
        assert text == expected and generation.usage.cached_tokens > PromptReader.CHUNK


@pytest.mark.slow
def test_snapshots_stay_few(options: dict):
    with Engine(**options) as engine:
        turns(engine, [SYSTEM, user("begin")], 25)
        line = lines(engine)[0]
        assert len(line.checkpoints) <= (0 if line.trimmable else line.CHECKPOINTS + 4)


@pytest.mark.slow
def test_a_miss_explains_itself(folder: Path):
    with Engine(str(folder / "qwen2")) as engine:
        messages = turns(engine, [SYSTEM, user("begin")], 3)
        answer(engine, messages)
        generation = engine.chat([*messages[:3], user("other words"), *messages[4:]], max_tokens=1)
        assert (generation.miss.message, generation.miss.role) == (3, "user")
        assert generation.miss.now.startswith("other") and generation.miss.was.startswith("turn")
        assert generation.miss.at <= generation.prompt_tokens - REREAD
        list(generation)
        assert engine.chat(messages, max_tokens=1).miss is None


@pytest.mark.slow
def test_the_flags_the_header_and_the_log_of_a_restarted_server(tmp_path: Path):
    def ask(server: Server, words: str) -> str:
        body = {
            "model": "demo",
            "max_tokens": 50,
            "messages": [
                {"role": "user", "content": "once " * 300},
                {"role": "assistant", "content": "ok"},
                {"role": "user", "content": words},
            ],
        }
        with urllib.request.urlopen(
            f"{server.url}/v1/messages", json.dumps(body).encode()
        ) as response:
            assert json.load(response)["content"][0]["text"] == words.removeprefix("say ")
            return response.headers["x-prompt-cache"]

    flags = (
        "--cache-dir",
        str(tmp_path / "kept"),
        "--cache-dir-size",
        "50MB",
        "--prompt-cache",
        "100 MB",
    )
    server = Server(*flags)
    assert ask(server, "say hello").startswith("reused=0; prompt=")
    assert server.stop() == 0
    server = Server(*flags, "--verbose")
    try:
        again = re.fullmatch(r"reused=(\d+); prompt=(\d+)", ask(server, "say hello"))
        assert int(again[1]) >= int(again[2]) - REREAD
        other = re.fullmatch(
            r"reused=(\d+); prompt=\d+; parts-at=(\d+); in=message 2 \(user\)",
            ask(server, "say goodbye"),
        )
        assert int(other[1]) > 300
        server.wait_for(
            r"reused \d+ \(parts at \d+ in message 2 \(user\): '.*goodbye.*' was '.*hello.*'\)"
        )
    finally:
        server.stop()


@pytest.mark.slow
def test_a_server_that_is_started_again_goes_on_without_any_flag(tmp_path: Path):
    schema = {"type": "object", "properties": {"command": {"type": "string"}}}
    bash = {"name": "Bash", "description": "Runs it.", "input_schema": schema}

    def grow(messages: list[dict]) -> tuple[int, int]:
        """Asks once more; returns the tokens that were reused, and all of prompt and answer."""
        body = {"model": "demo", "max_tokens": 60, "tools": [bash], "messages": messages}
        request = urllib.request.urlopen(f"{server.url}/v1/messages", json.dumps(body).encode())
        with request as response:
            answer = json.load(response)
        messages.append({"role": "assistant", "content": answer["content"]})
        called = [one["id"] for one in answer["content"] if one["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": id, "content": "a b"} for id in called]
        messages.append({"role": "user", "content": results or "say one"})
        usage = answer["usage"]
        read = usage["cache_read_input_tokens"]
        return read, read + usage["input_tokens"] + usage["output_tokens"]

    messages = [{"role": "user", "content": f"{'once ' * 300} run echo one"}]
    known = 0
    for turns in (3, 1):
        server = Server(cached=True, env={"HOME": str(tmp_path), "XDG_CACHE_HOME": ""})
        try:
            for _ in range(turns):
                reused, length = grow(messages)
                assert reused >= 0.95 * known
                known = length
        finally:
            assert server.stop() == 0
    (folder,) = tmp_path.rglob("prompts")
    assert folder.stat().st_mode & 0o777 == 0o700 and list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--no-cache-dir",)])
def test_a_server_starts_where_no_cache_can_be_kept(flags: tuple[str, ...], tmp_path: Path):
    (tmp_path / "mlx-server").write_text("in the way")
    server = Server(*flags, cached=True, env={"XDG_CACHE_HOME": str(tmp_path)})
    try:
        if not flags:
            assert "cannot keep a prompt cache in" in "".join(server.lines)
    finally:
        assert server.stop() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mlx-server"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--prompt-cache", "much"), "not a size"),
        (("--cache-dir", "/proc/none"), "cannot keep a prompt cache in /proc/none"),
        (("--kv-bits", "3"), "invalid choice"),
    ],
)
def test_bad_flags_are_one_clear_line(flags: tuple[str, ...], message: str):
    done = subprocess.run(
        [sys.executable, "mlx_server.py", "--port", "0", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
