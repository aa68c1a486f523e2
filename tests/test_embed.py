"""Embeddings: against the model's own forward pass, then over the wire with the official
clients."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy
import ollama
import openai
import pytest
from conftest import Server
from models import build_model
from test_http import ask

from _mlx_server.inference.decoding.prefill import PromptReader
from engine import (
    Embedding,
    Engine,
    InvalidRequest,
    ModelLoadError,
    Priority,
    PromptTooLong,
    Request,
)

POOLINGS = {
    "mean-embed": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    "cls-embed": {"pooling_mode_cls_token": True},
    "last-embed": {"pooling_mode_lasttoken": True},
    "new-embed": {"pooling_mode": "mean"},
    "max-embed": {"pooling_mode_max_tokens": True},
    "two-embed": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
}
LONG = "one two three four five " * 120


def embed(engine: Engine, text: str | list[int], model: str = "embed", **fields) -> list[float]:
    events = list(engine.submit(Request(model, prompt=text, embed=True, max_tokens=0, **fields)))
    return next(event.vector for event in events if isinstance(event, Embedding))


def states(path: Path, tokens: list[int]) -> numpy.ndarray:
    """The last hidden states of a text, all of it read at once."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    return numpy.array(model.model(mx.array([tokens]))[0].astype(mx.float32))


def tokens_of(path: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An embedding model, whose tokenizer ends each text with a token, the same one saved without a
    head, a model that chats, one that mlx-lm would read in one direction only, and some of
    sentence-transformers' with poolings of their own."""
    folder = tmp_path_factory.mktemp("models")
    path = build_model("qwen3", folder / "embed")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    bare = shutil.copytree(path, folder / "bare")
    config = json.loads((bare / "config.json").read_text())
    headless = {"tie_word_embeddings": False, "architectures": ["Qwen3Model"]}
    (bare / "config.json").write_text(json.dumps({**config, **headless}))
    import mlx.core as mx

    weights = {
        name.removeprefix("model."): value
        for name, value in mx.load(str(path / "model.safetensors")).items()
    }
    mx.save_safetensors(str(bare / "model.safetensors"), weights, {"format": "mlx"})
    build_model("hybrid", folder / "chat")
    both = shutil.copytree(path, folder / "both-ways-embed")
    (both / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    for mode, pooling in POOLINGS.items():
        (shutil.copytree(path, folder / mode) / "1_Pooling").mkdir()
        (folder / mode / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(models_dirs=[folder], context=1000) as engine:
        yield engine


# ------------------------------------------------------------------ the vectors


@pytest.mark.slow
@pytest.mark.parametrize("text", ["hi", "word " * 180, LONG])
def test_an_embedding_model_gives_its_state_at_the_end_token(
    engine: Engine, folder: Path, text: str
):
    tokens = tokens_of(folder / "embed", text)[:999]
    assert tokens_of(folder / "embed", "hi")[-1] == 0
    numpy.testing.assert_allclose(
        embed(engine, text, truncate=True),
        states(folder / "embed", [*tokens[:-1], 0])[-1],
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, pool",
    [
        ("mean", lambda states: states.mean(0)),
        ("cls", lambda states: states[0]),
        ("last", lambda states: states[-1]),
        ("new", lambda states: states.mean(0)),
    ],
)
def test_the_pooling_of_sentence_transformers_is_the_models_own(
    engine: Engine, folder: Path, mode: str, pool
):
    for tokens in ([5, 6, 7], [number * 7 % 500 for number in range(900)]):
        numpy.testing.assert_allclose(
            embed(engine, tokens, f"{mode}-embed"),
            pool(states(folder / "embed", tokens)),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("mode, said", [("max", "max"), ("two", "cls and mean")])
def test_another_pooling_is_refused(engine: Engine, mode: str, said: str):
    with pytest.raises(ModelLoadError, match=f"its pooling '{said}' is not supported"):
        embed(engine, "hi", f"{mode}-embed")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 514, 999])
def test_another_model_gives_the_mean_of_its_states_however_many_chunks_it_takes(
    engine: Engine, folder: Path, count: int
):
    tokens = [number * 7 % 500 for number in range(count)]
    numpy.testing.assert_allclose(
        embed(engine, tokens, "chat"), states(folder / "chat", tokens).mean(0), rtol=1e-3, atol=1e-3
    )


def test_weights_saved_without_a_head_and_its_names_are_the_same_model(engine: Engine):
    assert embed(engine, "hello") == embed(engine, "hello", "bare")


def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut(engine: Engine):
    with pytest.raises(PromptTooLong):
        embed(engine, LONG)
    assert len(embed(engine, LONG, truncate=True)) == 64


def test_a_text_of_nothing_is_refused(engine: Engine):
    with pytest.raises(InvalidRequest, match="without tokens"):
        embed(engine, "")


def test_a_model_that_reads_both_ways_is_refused(engine: Engine):
    with pytest.raises(InvalidRequest, match="both directions"):
        embed(engine, "hi", "both-ways-embed")


@pytest.mark.slow
def test_answers_go_on_and_come_out_the_same_beside_embeddings(engine: Engine):
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
    alone = "".join(engine.submit(Request("chat", **fields)).text())
    answer = engine.submit(Request("chat", **fields))
    vectors = [embed(engine, LONG[:1000], "chat") for _ in range(2)]
    assert ("".join(answer.text()), vectors[0]) == (alone, vectors[1])
    later = engine.submit(Request("chat", prompt=LONG[:1000], max_tokens=0))
    assert list(later) and later.usage.cached_tokens == 0


def test_a_cancelled_embedding_leaves_the_engine_idle(engine: Engine):
    generation = engine.submit(Request("embed", prompt=[5] * 900, embed=True, max_tokens=0))
    generation.cancel()
    engine.unload("embed")  # waits for it
    assert engine.stats().running == 0 and "embed" not in [
        loaded.model.name for loaded in engine.loaded()
    ]


@pytest.mark.parametrize("fields", [{"embed": True}, {}], ids=["embedding", "prompt"])
def test_steps_for_a_low_key_are_shorter_at_depth(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fields: dict
):
    monkeypatch.setattr(PromptReader, "DEEP", 128)

    def steps(first: int, priority: Priority) -> int:
        before = engine.stats().totals.prefill_passes
        prompt = [first, *([5] * 959)]
        request = Request("chat", prompt=prompt, max_tokens=1, priority=priority, **fields)
        assert list(engine.submit(request))
        assert list(engine.submit(Request("chat")))  # loads only, once the step has ended
        return engine.stats().totals.prefill_passes - before

    # Up to 512 tokens, and at most 512 times 128 by depth, or 64: up to 640, 704, 768, ... 960
    assert [steps(6, Priority.NORMAL), steps(7, Priority.LOW)] == [2, 7]


# ------------------------------------------------------------------ the wire


@pytest.fixture(scope="module")
def clients(folder: Path) -> Iterator[tuple[Server, ollama.Client, openai.OpenAI]]:
    server = Server("--models-dir", str(folder), "--context", "1000")
    # Not strict: the client's own type knows no base64, which it asks for.
    yield (
        server,
        ollama.Client(server.url),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0),
    )
    assert server.stop() == 0


def test_ollamas_client_gets_unit_vectors_and_cut_ones(clients):
    _, client, _ = clients
    whole = client.embed("embed", ["hello", "word"])
    assert [len(vector) for vector in whole.embeddings] == [64, 64] and whole.prompt_eval_count > 2
    assert client.embed("embed", "word").embeddings == whole.embeddings[1:]
    cut = client.embed("embed", "hello", dimensions=8).embeddings[0]
    assert math.hypot(*cut) == pytest.approx(1) == math.hypot(*whole.embeddings[0])
    scale = whole.embeddings[0][0] / cut[0]
    assert whole.embeddings[0][:8] == pytest.approx([number * scale for number in cut])


def test_the_older_route_gives_the_vector_as_it_is(clients):
    server, client, _ = clients
    vector = client.embeddings("embed", "hello").embedding
    assert math.hypot(*vector) != pytest.approx(1)
    assert [number / math.hypot(*vector) for number in vector] == pytest.approx(
        client.embed("embed", "hello").embeddings[0]
    )
    assert json.loads(ask(server, "POST", "/api/embeddings", {"model": "embed"})[1]) == {
        "embedding": []
    }


def test_without_a_text_ollamas_routes_only_load(clients):
    server, client, _ = clients
    assert (
        client.embed("embed", "", keep_alive=0).embeddings == []
        and client.embed("embed", []).embeddings == []
    )
    assert "embed:latest" in [model.model for model in client.ps().models]


def test_openais_client_gets_the_same_vectors_as_floats_and_as_bytes(clients):
    _, client, other = clients
    answer = other.embeddings.create(model="embed", input=["hello", "word"])  # asks for base64
    plain = other.embeddings.create(
        model="embed", input=["hello", "word"], encoding_format="float", dimensions=64
    )
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 2
    vectors = client.embed("embed", ["hello", "word"]).embeddings
    for packed, floats, expected in zip(answer.data, plain.data, vectors, strict=True):
        assert (
            packed.embedding == pytest.approx(floats.embedding, abs=1e-6)
            and floats.embedding == expected
        )


def test_openais_client_may_send_tokens(clients):
    _, _, client = clients
    one = client.embeddings.create(model="embed", input=[5, 6, 7], encoding_format="float").data
    both = client.embeddings.create(
        model="embed", input=[[5, 6, 7], [8]], encoding_format="float"
    ).data
    assert one[0].embedding == both[0].embedding != both[1].embedding


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("/api/embed", {"model": "embed", "input": [1]}, 400, "invalid input type"),
        ("/api/embed", {"model": "embed", "input": ["a", ""]}, 400, "an empty text"),
        (
            "/api/embed",
            {"model": "embed", "input": LONG, "truncate": False},
            400,
            "exceeds the model's maximum context length",
        ),
        ("/api/embed", {"input": "x"}, 404, "model '' not found"),
        ("/api/embed", {"model": "no", "input": "x"}, 404, "not found"),
        ("/api/embeddings", {"prompt": "x"}, 400, "model is required"),
        ("/v1/embeddings", {"model": "embed"}, 400, "input: "),
        ("/v1/embeddings", {"model": "embed", "input": [[]]}, 400, "empty"),
        ("/v1/embeddings", {"model": "embed", "input": [1.5]}, 400, "input: "),
        ("/v1/embeddings", {"model": "embed", "input": ["x"] * 2049}, 400, "at most 2048"),
        ("/v1/embeddings", {"model": "embed", "input": [99999]}, 400, "no token 99999"),
        ("/v1/embeddings", {"model": "embed", "input": LONG}, 400, "context_length_exceeded"),
        (
            "/v1/embeddings",
            {"model": "embed", "input": "x", "encoding_format": "hex"},
            400,
            "'float' or 'base64'",
        ),
        ("/v1/embeddings", {"model": "no", "input": "x"}, 404, "model_not_found"),
    ],
)
def test_what_cannot_be_embedded_is_an_error_in_the_dialect(
    clients, path: str, body: dict, status: int, said: str
):
    response, text = ask(clients[0], "POST", path, body)
    assert (response.status, said in text.decode()) == (status, True), text


@pytest.mark.slow
def test_an_embedding_model_does_not_chat(clients):
    with pytest.raises(ollama.ResponseError, match="does not support chat"):
        clients[1].chat("embed", [{"role": "user", "content": "hi"}])
