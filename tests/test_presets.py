"""Presets: what they fill in, and how they are kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from _mlx_server.inference.catalog.presets import PresetStore
from engine import EngineError, InvalidRequest, Preset, Request, Sampling

HI = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "S"}
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "messages, context, filled",
    [
        ([HI], [], [SYSTEM, *TURNS, HI]),
        (
            [{"role": "system", "content": "own"}, HI],
            [],
            [{"role": "system", "content": "own"}, *TURNS, HI],
        ),
        ([HI], [1, 2], [SYSTEM, HI]),
        ([], [], []),
    ],
)
def test_a_preset_begins_conversations(messages: list, context: list, filled: list):
    preset = Preset("p", "demo", system="S", messages=TURNS)
    assert preset.fill(Request("p", messages, context=context)).messages == filled


def test_a_preset_fills_in_what_a_request_leaves_open():
    preset = Preset("p", "demo", sampling=Sampling(top_k=5, seed=1), stop=["x"], max_tokens=9)
    filled = preset.fill(Request("p", sampling=Sampling(seed=2)))
    assert (filled.sampling, filled.stop) == (Sampling(top_k=5, seed=2), ["x"])
    assert filled.max_tokens == 9
    own = preset.fill(Request("p", stop=["y"], max_tokens=0))
    assert (own.stop, own.max_tokens) == (["y"], 0)


def test_threads_may_change_presets_at_the_same_time(tmp_path: Path):
    path = tmp_path / "new" / "presets.json"
    store = PresetStore(path)

    def change(thread: int) -> None:
        for number in range(10):
            store.put(Preset(f"Keep{thread}-{number}", "demo"))
            store.put(Preset(f"gone{thread}", "demo"))
            assert store.get(f"KEEP{thread}-{number}:latest") and list(store)
            assert store.remove(f"gone{thread}") and not store.remove(f"gone{thread}")

    threads = [threading.Thread(target=change, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {f"Keep{thread}-{number}" for thread in range(4) for number in range(10)}
    assert {preset.name for preset in store} == names
    assert {preset.name for preset in PresetStore(path)} == names
    assert [file.name for file in path.parent.iterdir()] == ["presets.json"]


def test_a_file_that_cannot_be_written_is_an_error_and_the_change_lasts(tmp_path: Path):
    (tmp_path / "file").write_text("")
    store = PresetStore(None)
    store.put(Preset("mine", "demo"))
    store = PresetStore(tmp_path / "file" / "presets.json")
    with pytest.raises(EngineError, match="presets.json cannot be written: .*until the end"):
        store.put(Preset("mine", "demo"))
    assert store.get("mine")


def test_presets_are_bounded(monkeypatch: pytest.MonkeyPatch):
    store = PresetStore(None)
    with pytest.raises(InvalidRequest, match="at most 1000000 characters"):
        store.put(Preset("p", "demo", system="x" * 10**6))
    monkeypatch.setattr(PresetStore, "MAX_PRESETS", 2)
    for name in ("a", "b", "a"):
        store.put(Preset(name, "demo"))
    with pytest.raises(InvalidRequest, match="2 presets already"):
        store.put(Preset("c", "demo"))
    assert [preset.name for preset in store] == ["a", "b"]


@pytest.mark.parametrize(
    "field",
    [{"modified": "a"}, {"modified": 1e300}, {"modified": float("nan")}, {"name": 5}]
    + [{"messages": [{"role": "user", "content": 5}]}, {"sampling": {"temperature": "x"}}]
    + [{"sampling": {"logit_bias": {"1": "x"}}}, {"stop": [5]}, {"max_tokens": "x"}],
    ids=str,
)
def test_a_damaged_file_is_told_at_the_start_and_fails_no_list_later(tmp_path: Path, field: dict):
    preset = {"name": "mine", "model": "demo", "modified": 1, "sampling": {}}
    (tmp_path / "presets.json").write_text(json.dumps([preset]))
    assert [one.name for one in PresetStore(tmp_path / "presets.json")] == ["mine"]
    (tmp_path / "presets.json").write_text(json.dumps([{**preset, **field}]))
    with pytest.raises(EngineError, match="cannot be understood"):
        PresetStore(tmp_path / "presets.json")
