"""A pulled model gets the MTP head that its conversion has lost."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mtp_models
import numpy as np
import ollama
import pytest
from conftest import PATIENCE, Server
from fake_hub import COMMIT, FakeHub, serving
from speculating import tokens
from test_mtp import loaded, said
from test_pull import environment, pull

from _mlx_server.inference.catalog.models import LocalModel, describe
from _mlx_server.inference.catalog.mtp_files import find_head

pytestmark = pytest.mark.slow

MODEL, SIDECAR, OFFICIAL = "mlx-community/Some-1B-4bit", "mlx-community/Some-1B-MTP-bf16", "org/own"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_two_files(folder: Path) -> dict[str, bytes]:
    """A checkpoint whose head is in the second of two files, between other tensors."""
    held = mx.load(str(folder / "model.safetensors"))
    files, places = contents(folder), {}
    del files["model.safetensors"]
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {
            key: one for key, one in held.items() if ("mtp." in key or "q_" in key) == number - 1
        }
        mx.save_safetensors(str(folder / name), part, {"format": "pt"})
        files[name] = (folder / name).read_bytes()
        places |= dict.fromkeys(part, name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    return files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a model without a head, of a sidecar, and of the model as it was trained."""
    folder = tmp_path_factory.mktemp("made")
    bare = mtp_models.build(folder / "bare", "qwen3_5", "sidecar").path
    raw = mtp_models.build(folder / "raw", "qwen3_5", "raw").path
    return {
        MODEL: contents(bare),
        SIDECAR: contents(bare.parent / "Some-1B-MTP-bf16"),
        OFFICIAL: in_two_files(raw),
    }


@pytest.fixture
def hub(made: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    with serving({name: dict(files) for name, files in made.items()}) as hub:
        hub.cards[MODEL] = {"base_model": [OFFICIAL]}
        yield hub


def pulled(hub: FakeHub, cache: Path) -> tuple[str, LocalModel]:
    """What `pull` says, and what it has brought."""
    program = pull(hub, cache, "pull", MODEL)
    out, _ = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0 and f"pulled {MODEL}" in out
    return out, describe("m", cache / "models--mlx-community--Some-1B-4bit/snapshots" / COMMIT)


def guesses(model: LocalModel) -> np.ndarray:
    return np.array(said(loaded(model).model, tokens(12), [], 2))


def test_a_sidecar_comes_along(hub: FakeHub, tmp_path: Path):
    out, model = pulled(hub, tmp_path / "hub")
    assert f"\nwith the MTP head of {SIDECAR}, " in out
    [file] = find_head(model).files
    assert "models--mlx-community--Some-1B-MTP-bf16" in str(file)
    assert not any("own" in path for _, path, _, _ in hub.asked)
    asked = len(hub.fetched())
    out, _ = pulled(hub, tmp_path / "hub")
    assert len(hub.fetched()) == asked and "MTP" not in out


def test_of_the_model_it_was_made_from_only_the_head_is_fetched(
    hub: FakeHub, made: dict[str, dict[str, bytes]], tmp_path: Path
):
    del hub.repos[SIDECAR]
    env = environment(hub.url, tmp_path / "hub", HF_TOKEN="secret")
    server = Server("--state", str(tmp_path / "presets.json"), env=env)
    steps = list(ollama.Client(server.url).pull(MODEL, stream=True))
    assert server.stop() == 0
    assert any(step.status.startswith(f"with the MTP head of {OFFICIAL}, ") for step in steps)
    assert steps[-1].status == "success" and steps[-3].completed == steps[-3].total
    folder = tmp_path / "hub/models--mlx-community--Some-1B-4bit/snapshots" / COMMIT
    model, raw = describe("m", folder), tmp_path / "raw"
    raw.mkdir()
    for name, content in made[OFFICIAL].items():
        (raw / name).write_bytes(content)
    expected = guesses(describe("raw", raw))
    assert np.abs(guesses(model) - expected)[0].max() < 1e-4
    ranges = [r for _, path, r, _ in hub.asked if path.startswith(f"/cdn/{OFFICIAL}/model-")]
    bounds = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in ranges]
    read = sum(end + 1 - start for start, end in bounds)
    [file] = find_head(model).files
    assert file.parent == folder / "mtp" and read < file.stat().st_size + 5000
    assert {path for _, path, _, token in hub.asked if token is None} == {
        path for _, path, _, _ in hub.asked if path.startswith("/cdn/")
    }


def without_base(hub: FakeHub) -> None:
    del hub.cards[MODEL]


def without_head(hub: FakeHub) -> None:
    hub.repos[OFFICIAL] = {
        name: content.replace(b"mtp.", b"ptm.") for name, content in hub.repos[OFFICIAL].items()
    }


def of_another_type(hub: FakeHub) -> None:
    hub.repos[OFFICIAL] = {
        name: content.replace(b'"F32"', b'"F8_"') for name, content in hub.repos[OFFICIAL].items()
    }


def gone(hub: FakeHub) -> None:
    del hub.repos[OFFICIAL]


def broken_off(hub: FakeHub) -> None:
    hub.damage = lambda name, content: content[:-5000] if name.startswith("model-") else content


def lying(hub: FakeHub) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.repos[OFFICIAL][name] = struct.pack("<Q", 2**60) + hub.repos[OFFICIAL][name][8:]


@pytest.mark.parametrize(
    "spoil, why",
    [
        (without_base, "it does not say which model it was made from"),
        (without_head, f"{OFFICIAL} has none"),
        (of_another_type, f"that of {OFFICIAL} is kept as F8_"),
        (gone, f"says 401 to {OFFICIAL}"),
        (broken_off, "makes no sense"),
        (lying, "makes no sense"),
    ],
)
def test_a_head_that_cannot_be_had_fails_nothing(hub: FakeHub, tmp_path: Path, spoil, why: str):
    del hub.repos[SIDECAR]
    spoil(hub)
    out, model = pulled(hub, tmp_path / "hub")
    assert "without an MTP head: " in out and why in out, out
    assert find_head(model) is None
    assert not list(model.path.rglob("*.incomplete"))


def test_what_a_repo_says_of_its_base_does_not_control_the_terminal(hub: FakeHub, tmp_path: Path):
    del hub.repos[SIDECAR]
    hub.cards[MODEL] = {"base_model": ["own/\x1b[2J"]}
    out, _ = pulled(hub, tmp_path)
    assert "without an MTP head: " in out and "\\x1b[2J" in out and "\x1b" not in out


def test_a_whole_model_is_no_sidecar(hub: FakeHub, tmp_path: Path):
    whole = {name.replace("model-", "x-"): one for name, one in hub.repos[OFFICIAL].items()}
    hub.repos["mlx-community/Some-1B-4bit-mtp"] = whole
    del hub.repos[SIDECAR]
    out, model = pulled(hub, tmp_path / "hub")
    assert f"head of {OFFICIAL}" in out and find_head(model)
    shutil.rmtree(model.path / "mtp")
    assert find_head(model) is None
