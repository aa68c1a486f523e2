"""What is known of a model, from the small files of its folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from model_folders import empty_home, make_model, write_weights

from _mlx_server.inference.catalog.models import gap_marks, read_file, read_shown_files
from engine import Library, LocalModel, ModelLoadError


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


def described(path: Path) -> LocalModel:
    return Library().resolve(str(path), trusted=True)


def test_digests_are_stable_and_distinct(home, tmp_path):
    path = make_model(tmp_path / "a/model")
    digest = described(path).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    os.utime(path / "model.safetensors", (5, 5))
    (path / "README.md").write_text("more")
    assert described(path).digest == digest
    assert described(make_model(tmp_path / "b/model")).digest == digest, "wherever it lies"
    others = [
        make_model(tmp_path / "c/model", bits=8),
        make_model(tmp_path / "d/model"),
        make_model(tmp_path / "tuned"),
    ]
    write_weights(others[1] / "model.safetensors", {"w": ("F16", [1, 2])})
    assert len({digest, *(described(other).digest for other in others)}) == 4


def test_sizes_and_times(home, tmp_path):
    path = make_model(tmp_path / "model")
    for number, seconds in ((1, 1_000), (2, 2_000)):
        (path / f"model-{number}.safetensors").write_bytes(
            b"\2\0\0\0\0\0\0\0{}" + bytes(100 * number)
        )
        os.utime(path / f"model-{number}.safetensors", (seconds, seconds))
    # The same weights again, which MLX does not load
    (path / "consolidated.safetensors").write_bytes(bytes(999))
    os.utime(path / "model.safetensors", (10, 10))
    model = described(path)
    assert model.size == 110 + 210 + (path / "model.safetensors").stat().st_size
    assert model.modified == 2_000


def test_parameters_from_headers(home, tmp_path):
    recipe = {"bits": 4, "group_size": 64, "wide": {"bits": 8}, "plain": False}
    path = make_model(tmp_path / "model", quantization=recipe)
    write_weights(
        path / "model.safetensors",
        {
            "deep.weight": ("U32", [1000, 8]),
            "deep.scales": ("F16", [1000, 1]),
            "deep.biases": ("F16", [1000, 1]),
            "wide.weight": ("U32", [1000, 8]),
            "wide.scales": ("F16", [1000, 1]),
            "wide.biases": ("F16", [1000, 1]),
            "norm.weight": ("F16", [7]),
            "gate.scales": ("F16", [3]),
        },
    )
    model = described(path)
    assert model.parameters == 64_000 + 32_000 + 7 + 3
    assert model.parameter_size == "96.0K"


@pytest.mark.parametrize(
    "count, text",
    [(7_615_616_512, "7.6B"), (1_310_720, "1.3M"), (136_731_648, "136.7M"), (12, "12")],
)
def test_parameter_size(home, tmp_path, count, text):
    model = described(make_model(tmp_path / "model", parameters=count))
    assert (model.parameters, model.parameter_size) == (count, text)


@pytest.mark.parametrize(
    "config, text",
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, "int4"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"bits": 8, "mode": "affine"}}, "int8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "BF16"),
        ({}, "BF16"),
        ({"torch_dtype": "float16"}, "F16"),
        ({"torch_dtype": None, "dtype": "float32"}, "F32"),
        ({"torch_dtype": None, "text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({"torch_dtype": None}, "unknown"),
    ],
)
def test_quantization(home, tmp_path, config, text):
    assert described(make_model(tmp_path / "model", bits=None, **config)).quantization == text


@pytest.mark.parametrize(
    "config, tokens",
    [
        ({}, 40960),
        (
            {"max_position_embeddings": None, "text_config": {"max_position_embeddings": 131072}},
            131072,
        ),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None}, 4096),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
    ],
)
def test_context_length(home, tmp_path, config, tokens):
    model = described(make_model(tmp_path / "model", **config))
    assert (model.context_length, model.embedding_length, model.family) == (tokens, 64, "qwen3")


@pytest.mark.parametrize(
    "options, capabilities",
    [
        ({}, ["completion", "tools"]),
        ({"template": "{{ messages }}"}, ["completion"]),
        ({"template": "{{ tools }}{% if enable_thinking %}"}, ["completion", "tools", "thinking"]),
        ({"template": "<think>"}, ["completion", "thinking"]),
        (
            {"template": "", "files": {"chat_template.jinja": "<|channel|>analysis {{ tools }}"}},
            ["completion", "tools", "thinking"],
        ),
        (
            {"template": "", "files": {"chat_template.json": {"chat_template": "{{ tools }}"}}},
            ["completion", "tools"],
        ),
        (
            {
                "template": [
                    {"name": "default", "template": "x"},
                    {"name": "tool_use", "template": "{{ tools }}"},
                ]
            },
            ["completion", "tools"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["completion", "tools"]),
        ({"architectures": ["BertModel"]}, ["embedding"]),
        ({"files": {"modules.json": []}}, ["embedding"]),
    ],
)
def test_capabilities(home, tmp_path, options, capabilities):
    assert described(make_model(tmp_path / "model", **options)).capabilities == capabilities


def test_a_name_says_that_a_model_embeds(home, tmp_path):
    assert described(make_model(tmp_path / "Qwen3-Embedding-0.6B-4bit")).capabilities == [
        "embedding"
    ]


@pytest.mark.parametrize("prefix", ["<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>"])
def test_marks_of_a_gap_are_found_among_the_tokens(home, tmp_path, prefix):
    marks = tuple(prefix.replace("prefix", word) for word in ("prefix", "suffix", "middle"))
    assert gap_marks(token for token in ["<s>", *reversed(marks)]) == marks
    assert gap_marks(iter(marks[:2])) == ()
    added = {str(number): {"content": mark} for number, mark in enumerate(marks)}
    tokenizer = {"added_tokens_decoder": added, "chat_template": ""}
    path = make_model(tmp_path / "model", files={"tokenizer_config.json": tokenizer})
    assert described(path).capabilities == ["completion", "insert"]


HOSTILE = {
    "infinite": '{"model_type": "qwen3", "max_position_embeddings": 1e999}',
    "enormous": '{"model_type": "qwen3", "max_position_embeddings": 1%s}' % ("0" * 4000),
    "negative": '{"model_type": "qwen3", "hidden_size": -5}',
    "deep": "[" * 100_000,
    "deep object": '{"model_type": "qwen3", "a": ' + "[" * 100_000,
    "a list": "[]",
    "no text config": '{"model_type": "qwen3", "text_config": [1]}',
    "rope": '{"model_type": "qwen3", "rope_scaling": 5}',
    "rope factor": '{"model_type": "qwen3", "rope_scaling": {"factor": "x", '
    '"original_max_position_embeddings": 3}}',
    "architectures": '{"model_type": "qwen3", "architectures": 5}',
    "quantization": '{"model_type": "qwen3", "quantization": "bits"}',
    "not UTF-8": b"\xff\xfe{}",
    "too large": '{"model_type": "qwen3", "a": "%s"}' % ("x" * (33 * 2**20)),
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_cannot_be_understood_is_skipped(home, tmp_path, caplog, config):
    make_model(tmp_path / "models" / "good")
    bad = make_model(tmp_path / "models" / "bad")
    (bad / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    caplog.set_level("DEBUG")
    library = Library([tmp_path / "models"])
    assert [model.name for model in library.models() if model.name != "demo"] == ["good"]
    assert "bad" in caplog.text


@pytest.mark.parametrize("recipe", [{"bits": "four"}, {"bits": None}, {}, None])
def test_a_quantization_of_another_form_is_none(home, tmp_path, recipe):
    path = make_model(tmp_path / "model", bits=None, quantization=recipe)
    assert described(path).quantization == "BF16"


@pytest.mark.parametrize("header", [{"a": 5}, {"w.weight": {"shape": [10**30]}}, [1], {"a": {}}])
def test_weights_with_a_strange_header_make_a_broken_model(home, tmp_path, header):
    path = make_model(tmp_path / "model")
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelLoadError, match="is broken"):
        described(path)


def test_a_template_that_leads_outside_is_not_shown(home, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("tools")
    path = make_model(tmp_path / "model", template="")
    (path / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_shown_files(described(path))


@pytest.mark.parametrize("shared", [False, True])
def test_a_template_among_the_blobs_of_a_hub_is_read(home, tmp_path, shared):
    hub = tmp_path / "hub"
    repo = hub / "models--org--model"
    path = make_model(repo / "snapshots" / "main", template="")
    blobs = (hub if shared else repo) / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{{ tools }}")
    (path / "chat_template.jinja").symlink_to(blobs / "abc")
    assert read_shown_files(described(path))[0] == "{{ tools }}"


def test_an_alias_of_a_broken_model_shows_no_path(home, tmp_path):
    path = make_model(tmp_path / "my models" / "bad")
    (path / "config.json").write_text("{")
    library = Library([tmp_path / "my models"], [("claude-*", "bad")])
    with pytest.raises(ModelLoadError, match="'bad' is broken") as raised:
        library.resolve("claude-x")
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there are no such files")
def test_a_file_of_the_system_that_says_it_is_empty_is_not_read():
    with pytest.raises(ValueError, match="too large"):
        read_file(Path("/proc/self/status"))
