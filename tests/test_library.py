"""The model library: what counts as a model on this machine, and what paths, aliases and vendors'
names mean."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from model_folders import add_repo, empty_home, make_model, write_weights

from _mlx_server.inference.catalog.presets import Preset
from engine import EngineError, Library, ModelLoadError, ModelNotFound


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


@pytest.fixture
def library(home) -> Library:
    return Library([home / "models"])


def names(library: Library) -> list[str]:
    return [model.name for model in library.models()]


@pytest.mark.parametrize("name", ["claude-x", "gpt-5", "opus", "sonnet", "HAIKU", "default"])
def test_vendor_names_mean_the_default_model(home, library, name):
    assert library.resolve(name).name == "demo"
    add_repo(home, "org/Alpha-1B-4bit")
    add_repo(home, "org/Alpha-Embedding-1B-4bit")  # cannot chat
    assert library.resolve(name).name == "org/Alpha-1B-4bit"
    for repo, age, options in (
        ("org/Beta-1B-4bit", 9, {}),
        ("org/Toolless-1B-4bit", 0, {"template": "{{ messages }}"}),
    ):
        written = library.resolve("alpha").modified - age
        os.utime(
            add_repo(home, repo, **options) / "model.safetensors", (written + 10, written + 10)
        )
    assert library.resolve(name).name == "org/Beta-1B-4bit"  # the newest that knows tools
    beta, alpha = library.resolve("beta"), library.resolve("alpha")
    assert library.resolve(name, last_used=beta) is beta
    assert library.resolve(name, default=alpha, last_used=beta) is alpha


def test_a_local_model_of_a_vendors_name_wins(home, library):
    add_repo(home, "org/claude-like-1B-4bit")
    add_repo(home, "org/Beta-1B-4bit")
    assert library.resolve("claude-like").name == "org/claude-like-1B-4bit"


def test_a_vendors_prefix_may_stand_before_any_name(home, library):
    add_repo(home, "org/Alpha-1B-4bit")
    add_repo(home, "org/Beta-1B-4bit")
    alpha, beta = library.resolve("alpha"), library.resolve("beta")
    for name in ("org/Alpha-1B-4bit", "alpha:1b", "Alpha-1B-4bit:latest"):
        assert library.resolve(f"anthropic/{name}") is alpha
        assert library.resolve(f"Anthropic/{name}") is alpha
    assert library.resolve("anthropic/claude-opus-5", default=beta) is beta
    preset = Preset("mine", alpha.name)
    library.presets.put(preset)
    assert library.preset("anthropic/mine") == preset
    assert library.resolve("anthropic/mine") is alpha
    for name in ("anthropic/nobody", "anthropic/", "anthropic//etc", f"anthropic/{home}"):
        with pytest.raises(ModelNotFound) as error:
            library.resolve(name)
        assert error.value.model == name
    aliased = Library([home / "models"], [("anthropic/alpha", "beta")])
    assert aliased.resolve("anthropic/alpha") is aliased.resolve("beta")
    add_repo(home, "anthropic/Alpha-1B-4bit")
    assert library.resolve("anthropic/alpha").name == "anthropic/Alpha-1B-4bit"


def test_without_any_model_nothing_stands_in(home, tmp_path):
    empty = Library([tmp_path / "nothing"])
    for model in empty.models():  # the built-in one, where it is shipped
        assert model.name == "demo"
    with pytest.raises(ModelNotFound, match=r"model 'qwen3:8b' not found; installed: (demo|none)$"):
        empty.resolve("qwen3:8b")


def test_aliases_are_globs_and_the_first_match_wins(home):
    add_repo(home, "org/Alpha-4B-4bit")
    add_repo(home, "org/Beta-8B-4bit")
    elsewhere = make_model(home / "elsewhere/gamma")
    library = Library(
        [home / "models"],
        [
            ("claude-*haiku*", "alpha:4b"),
            ("CLAUDE-*", "Beta-8B-4bit"),
            ("fast", "demo"),
            ("loop", "loop2"),
            ("loop2", "demo"),
            ("own", str(elsewhere)),
            ("x?", "sonnet"),
        ],
    )
    assert library.resolve("claude-haiku-5-5").name == "org/Alpha-4B-4bit"
    assert library.resolve("Claude-Opus-5-5:latest").name == "org/Beta-8B-4bit"
    assert library.resolve("FAST").name == "demo"
    assert library.resolve("own").path == elsewhere
    assert library.resolve("x1", default=library.resolve("beta")).name == "org/Beta-8B-4bit"
    # A target is not an alias again
    with pytest.raises(ModelNotFound, match="model 'loop' not found"):
        library.resolve("loop")


def test_trusted_paths(home, library, tmp_path, monkeypatch):
    path = make_model(tmp_path / "else where/My-Model")
    listed = names(library)
    with pytest.raises(ModelNotFound):
        library.resolve(str(path))
    model = library.resolve(str(path), trusted=True)
    assert (model.name, model.path) == ("My-Model", path)
    assert names(library) == ["My-Model", *listed]
    assert library.resolve(str(path)) == model, "a path that is listed may be asked for by anyone"
    assert library.resolve("my-model") == model
    monkeypatch.chdir(path.parent)
    assert library.resolve("./My-Model") == library.resolve("My-Model/", trusted=True) == model
    make_model(home / "tilde")
    assert library.resolve("~/tilde", trusted=True).name == "tilde"


def test_a_path_into_the_cache_has_the_repos_name(home, library):
    snapshot = add_repo(home, "org/Alpha-4B-4bit")
    assert library.resolve(str(snapshot), trusted=True).name == "org/Alpha-4B-4bit"
    assert library.resolve(str(snapshot.parents[1]), trusted=True).name == "org/Alpha-4B-4bit"


def test_requests_never_leave_the_model_folders(home, library, tmp_path, monkeypatch):
    path = make_model(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    for name in [
        str(path),
        "./secret",
        "secret",
        "../secret",
        "~/../secret",
        f"models/../../{path.name}",
        str(home / "models/../../secret"),
    ]:
        with pytest.raises(ModelNotFound):
            library.resolve(name)


@pytest.mark.parametrize(
    "files, reason",
    [
        (["model-q4.gguf", "README.md"], r"GGUF weights \(model-q4.gguf\)"),
        (["adapter_config.json", "adapters.safetensors"], "adapter"),
        (["config.json"], r"no model\*\.safetensors"),
        (["notes.txt"], "no config.json"),
    ],
)
def test_a_path_to_something_else_says_what_it_is(library, tmp_path, files, reason):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    with pytest.raises(ModelLoadError, match=reason):
        library.resolve(str(folder), trusted=True)


def test_a_path_to_nothing_or_a_file(library, tmp_path):
    with pytest.raises(ModelLoadError, match="No such file"):
        library.resolve(str(tmp_path / "absent"), trusted=True)
    with pytest.raises(ModelLoadError, match="GGUF"):
        library.resolve("models/qwen3-8b.gguf", trusted=True)


def test_models_dirs_of_each_depth(home, tmp_path):
    make_model(tmp_path / "one/Alpha-1B-4bit")
    make_model(tmp_path / "one/org/Beta-1B-4bit")
    make_model(tmp_path / "one/org/deep/Gamma-1B-4bit")
    itself = make_model(tmp_path / "Delta-1B-4bit")
    library = Library([tmp_path / "one", str(itself), tmp_path / "absent"])
    assert names(library)[:3] == ["Alpha-1B-4bit", "org/Beta-1B-4bit", "Delta-1B-4bit"]
    assert "Gamma" not in str(names(library))


def test_lm_studio_folders(home, library):
    make_model(home / ".lmstudio/models/lmstudio-community/Alpha-1B-MLX-4bit")
    make_model(home / ".cache/lm-studio/models/mlx-community/Beta-1B-4bit")
    (home / ".lmstudio/models/bartowski/Gamma-GGUF").mkdir(parents=True)
    (home / ".lmstudio/models/bartowski/Gamma-GGUF/gamma.gguf").write_text("GGUF")
    assert names(library) == [
        "demo",
        "lmstudio-community/Alpha-1B-MLX-4bit",
        "mlx-community/Beta-1B-4bit",
    ]
    assert library.resolve("alpha:1b").name == "lmstudio-community/Alpha-1B-MLX-4bit"


@pytest.mark.parametrize(
    "variable, folder",
    [
        ("HF_HUB_CACHE", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "hub"),
        ("HF_HOME", ""),
        ("XDG_CACHE_HOME", ".."),
    ],
)
def test_the_cache_may_be_elsewhere(home, library, tmp_path, monkeypatch, variable, folder):
    add_repo(home, "org/Alpha-1B-4bit")
    shutil.move(home / ".cache", tmp_path / "moved")
    assert names(library) == ["demo"]
    monkeypatch.setenv(variable, str(tmp_path / "moved/huggingface" / folder))
    assert names(library) == ["demo", "org/Alpha-1B-4bit"]


def test_the_main_revision_else_the_newest(home, library):
    old, new = (add_repo(home, "org/Alpha-1B-4bit", revision) for revision in ("aaaa", "bbbb"))
    refs = old.parents[1] / "refs/main"
    refs.write_text("aaaa\n")
    assert library.resolve("alpha").path == old
    refs.unlink()
    os.utime(old, (1000, 1000))
    assert library.resolve("alpha").path == new
    refs.write_text("cccc")  # a revision whose download has not begun
    assert library.resolve("alpha").path == new


def test_a_download_is_listed_when_it_is_complete(home, library):
    snapshot = add_repo(
        home,
        "org/Alpha-1B-4bit",
        files={
            "model.safetensors.index.json": {
                "metadata": {},
                "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
            }
        },
    )
    write_weights(snapshot / "model-1-of-2.safetensors", {})
    blob = snapshot.parents[1] / "blobs/feed"
    (snapshot / "model-2-of-2.safetensors").symlink_to(blob)
    assert names(library) == ["demo"]
    with pytest.raises(ModelLoadError, match="model-2-of-2.safetensors is missing"):
        library.resolve(str(snapshot), trusted=True)
    blob.parent.mkdir()
    write_weights(blob, {})
    os.utime(snapshot, (2000, 2000))
    assert names(library) == ["demo", "org/Alpha-1B-4bit"]


def test_what_is_no_text_model_is_not_listed(home, library):
    add_repo(home, "org/whisper-large-mlx")
    for model in home.rglob("models--org--whisper*/**/tokenizer.json"):
        model.unlink()
    add_repo(home, "org/FLUX-4bit", model_type=None)
    (add_repo(home, "org/Adapter") / "model.safetensors").rename(home / "adapters.safetensors")
    (home / "models/empty").mkdir()
    (home / "models/file").write_text("")
    assert names(library) == ["demo"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"text"',
        "\xff\xfe",
        '{"model_type": "x", "max_position_embeddings": "many"}',
        '{"model_type": "x", "quantization": 4}',
    ],
)
def test_a_broken_config_is_skipped_with_one_log_line(home, library, caplog, content):
    path = make_model(home / "models/broken")
    (path / "config.json").write_text(content, "latin-1")
    with caplog.at_level(logging.WARNING, "mlx_server"):
        assert names(library) == names(library) == ["demo"]
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("kind", ["qwen4_exp", "glm5_next", "deepseek_v4", "x" * 5000])
def test_a_model_that_mlx_lm_does_not_know_is_not_listed_and_its_names_say_so(home, library, kind):
    path = add_repo(home, "org/New-7B-4bit", model_type=kind)
    make_model(home / "models/Known-1B-4bit", model_type="kimi_k2")  # the name of another one
    assert sorted(names(library)) == ["Known-1B-4bit", "demo"]
    [said] = map(str, library.unsupported())
    assert said.startswith("model 'org/New-7B-4bit' cannot be loaded: mlx-lm 0.")
    assert f"does not know the model type '{kind[:64]}'" in said and len(said) < 200
    for name in ("org/New-7B-4bit", "new-7b-4bit", "new:7b"):
        with pytest.raises(ModelLoadError) as refused:
            library.resolve(name)
        assert str(refused.value) == said
    with pytest.raises(ModelLoadError, match="does not know the model type"):
        library.resolve(str(path), trusted=True)
    assert library.resolve("default").name == "Known-1B-4bit"
    add_repo(home, "org/New-7B-4bit", model_type="qwen3")
    os.utime(path / "config.json", (3000, 3000))
    assert library.resolve("new:7b").family == "qwen3" and not library.unsupported()


def test_weights_that_are_no_safetensors_file_are_skipped(home, library):
    (make_model(home / "models/broken") / "model.safetensors").write_bytes(b"\xff" * 100)
    assert names(library) == ["demo"]


def test_a_changed_folder_is_read_again(home, library):
    path = make_model(home / "models/Alpha-1B")
    assert library.resolve("alpha").context_length == 40960
    assert library.resolve("alpha") is library.resolve("alpha"), "an unchanged one is not"
    make_model(path, max_position_embeddings=1234)
    os.utime(path / "config.json", (3000, 3000))
    assert library.resolve("alpha").context_length == 1234
    shutil.rmtree(path)
    with pytest.raises(ModelNotFound):
        library.resolve("alpha")


def test_the_first_of_one_name_counts(home, tmp_path):
    add_repo(home, "org/Alpha-1B-4bit")
    mine = make_model(tmp_path / "mine/org/alpha-1b-4bit")
    library = Library([tmp_path / "mine"])
    assert [model.path for model in library.models() if model.name != "demo"] == [mine]


def test_the_built_in_model_needs_no_folder(home):
    assert names(Library()) == ["demo"]


def test_the_built_in_model_of_an_installation(home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(
        sys.modules["_mlx_server.inference.catalog.library"],
        "__file__",
        str(tmp_path / "a/b/c/d/library.py"),
    )
    make_model(tmp_path / "share/mlx-server/demo")
    assert [model.path for model in Library().models()] == [tmp_path / "share/mlx-server/demo"]


def test_threads_may_resolve_at_the_same_time(home, library):
    paths = [make_model(home / f"elsewhere/Model{number}-1B") for number in range(8)]
    failures = []

    def resolve_all() -> None:
        try:
            for path in paths:
                assert library.resolve(str(path), trusted=True).name == path.name
                library.models()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=resolve_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(names(library)) == [path.name for path in paths] + ["demo"]


def add_blobs(home: Path, repo: str, content: bytes, revision: str = "0123abcd") -> Path:
    """Lays a repo out in the Hugging Face cache with its weights in a blob; returns its folder."""
    snapshot = add_repo(home, repo, revision)
    folder = snapshot.parents[1]
    write_weights(snapshot / "model.safetensors", {})
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes((snapshot / "model.safetensors").read_bytes() + content)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    return folder


def share_blobs(folder: Path) -> list[Path]:
    """Moves a repo's blobs into the store that repos share, where huggingface_hub keeps files that
    came by Xet; returns where they are then."""
    store = folder.parent / "blobs"
    store.mkdir(exist_ok=True)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    shared = []
    for blob in (folder / "blobs").iterdir():
        place = store / blob.name[:2] / blob.name
        place.parent.mkdir(exist_ok=True)
        blob.replace(place)
        blob.symlink_to(os.path.relpath(place, blob.parent))
        with place.with_name(f"{place.name}.refs").open("a") as references:
            references.write(f"{blob.relative_to(folder.parent)}\n")
        shared.append(place)
    return shared


def test_a_deleted_model_of_the_cache_frees_its_blobs(home, library):
    alpha, beta = (add_blobs(home, f"org/{name}-1B-4bit", name.encode()) for name in ("A", "B"))
    library.delete("org/a-1b-4bit", library.resolve("org/A-1B-4bit"))
    assert not alpha.exists() and (beta / "blobs").exists()
    assert names(library) == ["demo", "org/B-1B-4bit"]


def test_a_deleted_model_of_the_cache_frees_what_no_other_repo_shares(home, library):
    alpha, beta = (add_blobs(home, f"org/{name}-1B-4bit", b"same") for name in ("A", "B"))
    [place] = share_blobs(alpha)
    assert share_blobs(beta) == [place] and names(library) == [
        "demo",
        "org/A-1B-4bit",
        "org/B-1B-4bit",
    ]
    library.delete("org/A-1B-4bit", library.resolve("org/A-1B-4bit"))
    assert not alpha.exists() and place.exists() and names(library) == ["demo", "org/B-1B-4bit"]
    library.delete("org/B-1B-4bit", library.resolve("org/B-1B-4bit"))
    assert not beta.exists() and not place.exists() and names(library) == ["demo"]


def test_broken_entries_of_the_cache_keep_nothing_from_being_deleted(home, library):
    folder = add_blobs(home, "org/Alpha-1B-4bit", b"alpha")
    [place] = share_blobs(folder)
    # What scans of the cache stumble over, in the repo itself and in another one
    for repo in (folder, add_blobs(home, "org/Broken-1B-4bit", b"broken")):
        (repo / "refs" / "other").write_bytes(b"\xff\xfe")
        partial = repo / "snapshots" / "ffff"
        partial.mkdir()
        (partial / "model.safetensors").symlink_to("nowhere")
    (folder.parent / "models--file").write_text("")
    library.delete("org/Alpha-1B-4bit", library.resolve("org/Alpha-1B-4bit"))
    assert not folder.exists() and not place.exists()
    assert names(library) == ["demo", "org/Broken-1B-4bit"]


def test_a_model_that_cannot_be_deleted_is_an_error(home, library, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    cached = add_blobs(home, "org/Alpha-1B-4bit", b"alpha")
    make_model(home / "models/Beta-1B-4bit")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    for name in ("org/Alpha-1B-4bit", "Beta-1B-4bit"):
        with pytest.raises(EngineError, match=f"'{name}' cannot be deleted: Permission denied"):
            library.delete(name, library.resolve(name))
    assert cached.exists() and len(names(library)) == 3
