"""Images for Gemma 3 and 4: images that are read as a whole, their towers' weights, their sizes."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_vision import FILES, OTHER, answer, conversation, finish, logits_of, reference, runs
from vision_models import build_vision_model, convert

from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.images.image_layout import Gemma3Layout, Gemma4Layout
from engine import Engine

WHOLE = ["gemma3", "gemma4_large"]  # whose attention goes both ways within an image


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    for kind in ("gemma3", "gemma4", "gemma4_large"):
        build_vision_model(kind, folder / kind)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_no_chunk_and_no_checkpoint_ends_within_an_image(
    models: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 20 tokens and restore points at each 50th, with images of 60 and more."""
    monkeypatch.setattr(PromptReader, "CHUNK", 20)
    monkeypatch.setattr(PromptReader, "SPARSE", 50)
    monkeypatch.setattr(PromptReader, "WORTH", 8)
    with Engine(str(models / kind)) as engine:
        broken = engine.submit(conversation(*FILES))
        while runs(engine) == 0:
            next(broken)
        broken.cancel()
        assert answer(engine, conversation(*FILES)) == reference(kind)["answer"].tolist()
        assert runs(engine) == 2
        # A sliding window goes back to restore points alone
        other = engine.submit(conversation(FILES[0], OTHER))
        warm = finish(other).tokens[other.prompt_tokens :]
        first = engine.count_tokens(conversation(FILES[0], text=""))
        assert 60 < other.cached_tokens <= first and runs(engine) == 3
    with Engine(str(models / kind)) as engine:
        assert answer(engine, conversation(FILES[0], OTHER)) == warm
        assert warm != answer(engine, conversation(*FILES))


@pytest.mark.slow
def test_a_quantised_cache_of_layers_without_a_window(models: Path):
    with Engine(str(models / "gemma3"), kv_bits=8) as engine:
        first = answer(engine, conversation(*FILES))
        assert len(first) == 24 and answer(engine, conversation(*FILES)) == first
        assert runs(engine) == 2


def in_mlx_form(name: str, value: mx.array) -> tuple[str, mx.array]:
    """A weight as mlx-vlm writes it."""
    name = re.sub("^vision_tower.", "vision_tower.vision_model.", name)
    name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
    return name, value.moveaxis(1, -1) if name.endswith("patch_embedding.weight") else value


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, layer", [("gemma3", ".mlp.fc2.weight"), ("gemma4", ".mlp.down_proj.linear.weight")]
)
def test_a_tower_in_mlx_form_that_is_quantised(models: Path, tmp_path: Path, kind: str, layer: str):
    build_vision_model(kind, tmp_path)
    convert(tmp_path, in_mlx_form, lambda name: name.endswith(layer), group_size=32)
    assert "vision" in describe("m", tmp_path).capabilities
    _, plain = logits_of(models / kind, 1000)
    _, logits = logits_of(tmp_path, 1000)
    assert 0 < np.abs(plain - logits).max() < 0.1 * np.ptp(plain)


def test_without_a_tower_it_does_not_see(tmp_path: Path):
    build_vision_model("gemma3", tmp_path, tower=False)
    assert "vision" not in describe("m", tmp_path).capabilities


GEMMA3 = {
    "vision_config": {"image_size": 896, "patch_size": 14},
    "mm_tokens_per_image": 256,
    "boi_token_index": 1,
    "eoi_token_index": 2,
    "image_token_index": 3,
}
GEMMA4 = {
    "vision_config": {"patch_size": 16, "pooling_kernel_size": 3},
    "text_config": {},
    "boi_token_id": 1,
    "eoi_token_id": 2,
}


def test_an_image_of_gemma_3_is_a_square():
    found = Gemma3Layout(GEMMA3, {}, {}, 100).place(1920, 1080)
    assert (found.width, found.height, found.columns, found.rows) == (896, 896, 16, 16)
    with pytest.raises(ValueError):
        Gemma3Layout({**GEMMA3, "mm_tokens_per_image": 250}, {}, {}, 100)


@pytest.mark.parametrize(
    "size, most, placed",  # as transformers computes it
    [
        ((1920, 1080), 280, (22, 12)),
        ((1920, 1080), 1120, (44, 25)),
        ((90, 130), 280, (13, 20)),
        ((1, 1), 280, (16, 16)),
        ((2000, 10), 70, (70, 1)),
        ((10, 2000), 70, (1, 70)),
        ((1000, 900), 1, (1, 1)),
    ],
)
def test_an_image_of_gemma_4_takes_as_many_tokens_as_it_may(
    size: tuple[int, int], most: int, placed: tuple[int, int]
):
    found = Gemma4Layout(GEMMA4, {"max_soft_tokens": 1120}, {}, most).place(*size)
    assert (found.columns, found.rows) == placed
    assert (found.width, found.height) == (48 * found.columns, 48 * found.rows)
