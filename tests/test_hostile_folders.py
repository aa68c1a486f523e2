"""Folders of models that mean harm: one costs no more than itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import build_model
from PIL import Image

from _mlx_server.inference.catalog.models import describe, generation_defaults
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from _mlx_server.inference.images.images import read_pixels
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from engine import Engine, InvalidRequest, Library, ModelLoadError, Request

HI = [{"role": "user", "content": "say hi"}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built")
    build_model("qwen2", path / "qwen2")
    build_model("hybrid", path / "hybrid")
    return path


@pytest.fixture
def models(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the model `good`, which every user may look into."""
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        shutil.copytree(built / "qwen2", path / "good")
        yield path


@pytest.fixture
def bad(models: Path) -> Path:
    """A copy of `good`."""
    return Path(shutil.copytree(models / "good", models / "bad"))


def revision(models: Path) -> Path:
    """The file that says which revision of a repo is the main one."""
    path = models / "models--org--bad" / "refs" / "main"
    path.parent.mkdir(parents=True)
    return path


def main_of_pipe(models: Path) -> None:
    os.mkfifo(revision(models))


def main_of_no_path(models: Path) -> None:
    revision(models).write_text("a\0b")


def main_without_end(models: Path) -> None:
    path = revision(models)
    path.touch()
    os.truncate(path, 1 << 40)


def main_elsewhere(models: Path) -> None:
    shutil.move(models / "good", models / ".hidden")
    revision(models).write_text(str(models / ".hidden"))
    shutil.copytree(models / ".hidden", models / "good")


def link_to_itself(models: Path) -> None:
    (models / "a").symlink_to("a")


def unreadable_folder(models: Path) -> None:
    (models / "a").mkdir(mode=0)


def unreadable_folder_of_folders(models: Path) -> None:
    (models / "org" / "a").mkdir(parents=True)
    (models / "org" / "a").chmod(0)
    (models / "org").chmod(0)


@contextlib.contextmanager
def as_anyone() -> Iterator[None]:
    """The superuser may read everything."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    "harm",
    [
        main_of_pipe,
        main_of_no_path,
        main_without_end,
        main_elsewhere,
        link_to_itself,
        unreadable_folder,
        unreadable_folder_of_folders,
    ],
)
def test_the_others_are_listed(models: Path, harm: Callable[[Path], None]):
    harm(models)
    with as_anyone():
        names = [model.name for model in Library([models]).models()]
    (models / "org").exists() and (models / "org").chmod(0o700)
    assert names[:1] == ["good"] and set(names) <= {"good", "demo"}


@pytest.mark.parametrize(
    "name", ["model-2.safetensors", "tokenizer_config.json", "generation_config.json", "notes"]
)
def test_a_folder_with_a_pipe_is_no_model(bad: Path, name: str):
    local = describe("bad", bad)
    (bad / name).unlink(missing_ok=True)
    os.mkfifo(bad / name)
    with pytest.raises(ModelLoadError, match=f"{name} is no file"):
        describe("bad", bad)
    # Nor is it opened if it has come since the folder was looked at
    with pytest.raises(ModelLoadError, match=f"{name} is no file"):
        TextTokenizer.load(local)
    with pytest.raises(ModelLoadError, match=f"{name} is no file"):
        Weights(local, None, Group())


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json"])
def test_no_prompt_is_made_of_a_file_elsewhere(bad: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("secret")
    (bad / name).unlink(missing_ok=True)
    (bad / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match="leads outside of the model's folder"):
        TextTokenizer.load(describe("bad", bad))


def test_a_model_may_be_made_of_links_to_another(models: Path):
    (models / "linked").mkdir()
    for path in (models / "good").iterdir():
        (models / "linked" / path.name).symlink_to(path)
    assert TextTokenizer.load(describe("linked", models / "linked")).encode("a")


@pytest.mark.parametrize("target", ["cache/models--o--m/blobs/0a1b", "ssd/tokenizer.json"])
def test_a_tokenizer_may_be_a_link_to_a_cache_or_to_another_tokenizer(bad: Path, target: str):
    real = bad.parent / "elsewhere" / target
    real.parent.mkdir(parents=True)
    shutil.move(bad / "tokenizer.json", real)
    (bad / "tokenizer.json").symlink_to(real)
    assert TextTokenizer.load(describe("bad", bad)).encode("a")


@pytest.mark.parametrize(
    "where", [{"vocab": "PATH"}, {"mecab_kwargs": {"mecab_dic": "PATH"}}], ids=str
)
def test_no_vocabulary_is_made_of_a_file_elsewhere(bad: Path, tmp_path: Path, where: dict):
    (tmp_path / "secret").write_text("secret\n")
    text = json.dumps(where).replace("PATH", str(tmp_path / "secret"))
    change(bad / "tokenizer_config.json", **json.loads(text))
    with pytest.raises(ModelLoadError, match="is a file elsewhere"):
        TextTokenizer.load(describe("bad", bad))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 10**9}, {"text_config": {"num_experts": 10**9}}]
)
def test_a_model_of_a_billion_layers_is_broken(bad: Path, values: dict[str, Any]):
    change(bad / "config.json", **values)
    with pytest.raises(ModelLoadError, match="is broken"):
        describe("bad", bad)


def test_no_list_grows_by_what_a_model_says_that_it_is(bad: Path):
    change(bad / "config.json", quantization={"bits": 4, "mode": "m" * 10**6})
    assert describe("bad", bad).quantization == "m" * 64
    change(bad / "config.json", model_type="m" * 10**6, model_file="x.py")
    assert describe("bad", bad).family == "m" * 64


def test_headers_that_take_minutes_to_read_are_not_read(bad: Path):
    header = b"{}".ljust(32 << 20)
    (bad / "header").write_bytes(struct.pack("<Q", len(header)) + header)
    for number in range(3):
        (bad / f"model-{number}.safetensors").symlink_to("header")
    with pytest.raises(ModelLoadError, match="is broken"):
        describe("bad", bad)


def test_defaults_that_no_request_could_have_are_none(bad: Path):
    hostile = {"top_k": 1.5, "temperature": 1e300, "repetition_penalty": float("inf")}
    (bad / "generation_config.json").write_text(json.dumps({"do_sample": True, **hostile}))
    found = generation_defaults(bad)
    assert (found.top_k, found.temperature, found.repetition_penalty) == (None, 1.0, None)


def test_an_image_is_not_made_as_large_as_a_model_says():
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    with pytest.raises(InvalidRequest) as failure:
        read_pixels(content.getvalue(), lambda width, height: (50_000, 50_000), 2)
    assert "50000 x 50000 pixels are wanted" in str(failure.value.__cause__)


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"}},
        {"added_tokens": [{"id": 500, "content": "x" * 10**6, "special": True}]},
    ],
    ids=["panic", "long"],
)
def test_a_tokenizer_that_panics_is_the_models_own_failure(bad: Path, values: dict[str, Any]):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token in values.get("added_tokens", []):
        token.update(flags)
    change(bad / "tokenizer.json", **values)
    with pytest.raises(ModelLoadError, match="the tokenizer of model 'bad' cannot be loaded"):
        TextTokenizer.load(describe("bad", bad))


@pytest.mark.parametrize("header", [[1], {"mtp.fc.weight": {}, "x.conv1d.weight": 5}], ids=str)
def test_a_file_that_only_looks_like_a_head_holds_nobody_up(built: Path, models: Path, header: Any):
    shutil.copytree(built / "hybrid", models / "next")
    text = json.dumps(header).encode()
    (models / "next" / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with Engine(models_dirs=[models]) as engine:
        evil = engine.submit(Request(model="next", messages=HI, max_tokens=1))
        list(evil)
        assert engine.chat("say hi", model="demo").text()


def test_a_tokenizer_of_millions_of_tokens_is_not_loaded(bad: Path):
    model = json.loads((bad / "tokenizer.json").read_text())["model"]
    change(bad / "tokenizer.json", model={**model, "vocab": {str(n): n for n in range(700_000)}})
    with pytest.raises(ModelLoadError, match="too many tokens"):
        TextTokenizer.load(describe("bad", bad))


@pytest.mark.slow
def test_a_model_may_have_a_token_for_each_of_65536_sounds(bad: Path):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokens = [
        {"id": 200_000 + n, "content": f"<|speech_{n}|>", **flags, "special": n < 100}
        for n in range(65_536)
    ]
    model = json.loads((bad / "tokenizer.json").read_text())["model"]
    words = {f"w{n}": 1000 + n for n in range(199_000)}
    change(bad / "tokenizer.json", model={**model, "vocab": model["vocab"] | words})
    change(bad / "tokenizer.json", added_tokens=tokens)
    decoder = {str(one.pop("id")): one for one in tokens}
    config = bad / "tokenizer_config.json"
    change(config, added_tokens_decoder=decoder)
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2))
    assert config.stat().st_size > 8 << 20
    assert len(TextTokenizer.load(describe("bad", bad)).encode("<|speech_65535|>")) == 1


def test_a_user_without_a_home_has_models_as_well(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", "~nobody-of-this-name")
    monkeypatch.setenv("HF_HOME", "~nobody-of-this-name/hub")
    found = Library([models, "~nobody-of-this-name/models"]).models()
    assert found[0].name == "good"
