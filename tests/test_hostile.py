"""What models, clients and folders can send costs no more than its length."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from call_families import FAMILIES
from conftest import PATIENCE, Server
from parsing import TOOLS, tool
from PIL import Image
from schemas import SCHEMAS
from test_http import ask

import dialects
from _mlx_server.inference.constrained.schema import TooComplex, ToolTypes, has_finite_value
from _mlx_server.inference.constrained.schema_limits import check_enforceable
from _mlx_server.inference.images.images import read_pixels
from _mlx_server.inference.output.parser import OutputParser
from _mlx_server.inference.protocol import Token
from _mlx_server.wire import reply
from _mlx_server.wire.ollama_embeddings import OllamaEmbed
from _mlx_server.wire.reply import Reply
from engine import Embedding, Engine, InvalidRequest, ModelNotFound, Text

# What a model that has lost its way repeats
REPEATED = [
    *(" ", "\n", "a", "a ", "\\", '"', "{", "[", "(", "<", ",", "{[", '{"', '":', ", ", "1,"),
    *("to=", "name=", 'name="', "name='a' ", 'tool="', 'key="a" ', 'type="a" ', '"type": 1, '),
    *("END", "START", "START{", 'START{"a', "<function=", "<parameter=a>", "```json", "<invoke "),
    *("OPEN", "CLOSE", "CLOSEOPEN", "OPENCLOSE", "OPENOPENCLOSE"),
    *('{"arguments":{},"name":"get_time"}', '{"arguments":{},"name":"get_time",}', "call:a ", "=a"),
]
# Behind the call tag; CALL stands for a call up to the middle of a value, as do OPEN and CLOSE for
# its two halves with their tags
BEGINNINGS = ["", '{"a": "', '<invoke x="', "to=", "a", "CALL"]


def cost(work: Callable[[str], object], repeated: str, times: int) -> float:
    """Seconds of this thread's time."""
    began = time.thread_time()
    work(repeated * times)
    return time.thread_time() - began


def grows(work: Callable[[str], object], repeated: str, times: int) -> float:
    """How much more the fourfold text costs. Where it is much, a machine that was busy with other
    work is given another chance."""
    for _ in range(4):
        few, many = (cost(work, repeated, times * factor) for factor in (1, 4))
        growth = many / max(few, 0.002)
        if growth < 8:
            break
    return growth


def costly(family: str, beginnings: list[str], repetitions: list[str]) -> dict[str, float]:
    """What costs an answer of this family more than its length, and how much more."""
    format, start, write, _, end = FAMILIES[family]
    call = write("Write", {"content": "x"})
    first, second = start + call[: call.rindex("x")], call[call.rindex("x") + 1 :] + end
    found = {}
    for beginning in beginnings:
        before = start + beginning.replace("CALL", call[: call.rindex("x")])

        def answer(text: str, before: str = before) -> None:
            parser = OutputParser(format, TOOLS)
            for at in range(0, len(text), 32):
                parser.feed((before if at == 0 else "") + text[at : at + 32])
            parser.finish()

        for repeated in repetitions:
            pumped = repeated.replace("START", start or "<|channel|>").replace("END", end)
            pumped = pumped.replace("OPEN", first).replace("CLOSE", second)
            if pumped and (growth := grows(answer, pumped, 2500 // len(pumped))) >= 8:
                found[before + pumped] = growth
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_repeats_costs_its_length(family: str) -> None:
    assert not costly(family, ["", "to="], ["\n", "a", "START"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_model_repeats_costs_its_length(family: str) -> None:
    assert not costly(family, BEGINNINGS, REPEATED)


def doubling(word: str, levels: int = 40) -> dict:
    """Definitions each of which names the next one twice."""
    definitions = {f"d{n}": {word: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    definitions[f"d{levels}"] = {"type": "object", "properties": {"a": {"type": "string"}}}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def test_definitions_that_double_at_every_level_are_given_up(caplog):
    with pytest.raises(TooComplex):
        has_finite_value(doubling("allOf"))
    bad = {"type": "function", "function": {"name": "Bad", "parameters": doubling("allOf")}}
    types = ToolTypes([tool("Good", a={"type": "integer"}), bad])
    assert types["Good"]["a"] == {"integer"} and types["Bad"]["a"] == set()
    assert "Bad" in caplog.text


@pytest.mark.parametrize("length", [10, 2000])
def test_a_chain_of_definitions_is_no_doubling(length):
    chain = {
        f"d{n}": {
            "type": "object",
            "required": ["a"],
            "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}},
        }
        for n in range(length)
    }
    assert has_finite_value({"$ref": "#/$defs/d0", "$defs": chain})


def patterns(number: int) -> list[dict]:
    return [{"pattern": f"(.*a.{{{20 + n}}}.*)"} for n in range(number)]


def alternatives(of: str, number: int) -> dict:
    return {"anyOf": [{"type": "object", "properties": {f"{of}{n}": {}}} for n in range(number)]}


COSTLY = {
    "patterns": {"type": "string", "allOf": patterns(20)},
    "patterns of a property": {"allOf": [{"properties": {"a": one}} for one in patterns(20)]},
    "patterns by reference": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"allOf": [{"$ref": "#/$defs/b"}, *patterns(3)]},
            "b": {"allOf": patterns(3), "type": "string"},
        },
    },
    "multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]},
    "combinations": {"allOf": [alternatives(f"k{n}", 4) for n in range(6)]},
    "properties": {"type": "object", "properties": {f"k{n}": {} for n in range(3000)}},
    "properties in objects": {
        "properties": {
            f"o{m}": {"type": "object", "properties": {f"k{n}": {} for n in range(100)}}
            for m in range(50)
        }
    },
    "values": {"pattern": "(.*a.{20}.*)", "enum": [f"x{n}" for n in range(4000)]},
    "length": {"enum": ["x" * 300_000]},
    "a long pattern": {"pattern": "a" * 3000},
    "doubling": doubling("allOf"),
}


@pytest.mark.parametrize("schema", COSTLY.values(), ids=COSTLY)
def test_a_format_that_takes_too_long_to_compile_is_refused(demo, schema):
    with pytest.raises(InvalidRequest, match="the output format cannot be enforced: its|a pattern"):
        demo.chat("hello", format=schema)


@pytest.mark.slow
def test_a_tool_with_such_a_schema_is_not_held_to_it(demo, caplog):
    tools = [tool("Good"), tool("Bad", a=COSTLY["patterns"], b=doubling("allOf"))]
    list(demo.chat("hello", tools=tools, strict=True, max_tokens=2))
    assert "calls are not held to their schemas: its schema has more than" in caplog.text


def test_schemas_of_use_are_enforceable():
    for schema in SCHEMAS:
        check_enforceable([schema])


@pytest.fixture(scope="module")
def demo():
    with Engine("demo") as engine:
        yield engine


def test_documents_are_read_without_looking_for_the_reader_each_time():
    looked: list[str] = []
    find_spec = importlib.util.find_spec

    def counted(name: str) -> object:
        looked.append(name)
        return find_spec(name)

    block = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}
    block["source"]["data"] = base64.b64encode(b"%PDF-1.4\n").decode()
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [block] * 50}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", counted)
        reply_of("/v1/messages", body)
    assert len(looked) <= 2


def test_stop_sequences_are_bounded(demo):
    list(demo.chat("hello", stop=["x"] * 64, max_tokens=1))
    for stops in (["x"] * 65, ["x" * 1001]):
        with pytest.raises(InvalidRequest, match="at most 64 stop sequences"):
            demo.chat("hello", stop=stops)


def test_a_long_name_is_not_found(demo):
    for name in ("1" * 5000, "a" * 10**6, "qwen-" + "9" * 5000 + "b"):
        with pytest.raises(ModelNotFound) as raised:
            demo.resolve(name)
        assert len(str(raised.value)) < 1000


# ------------------------------------------------------------------ long answers

SAYS = {"model": "demo", "messages": [{"role": "user", "content": "count to 9"}]}
WITH_LOGPROBS = [
    ("/v1/chat/completions", {**SAYS, "logprobs": True, "top_logprobs": 20, "n": 4}, 4),
    ("/v1/completions", {"model": "demo", "prompt": ["a", "b"], "logprobs": 20, "n": 3}, 6),
    ("/api/chat", {**SAYS, "logprobs": True, "top_logprobs": 20}, 1),
    (
        "/v1/responses",
        {
            "model": "demo",
            "input": "count to 9",
            "top_logprobs": 20,
            "include": ["message.output_text.logprobs"],
        },
        1,
    ),
]
LIMITS = {"max_tokens": 10**6, "max_output_tokens": 10**6, "options": {"num_predict": 10**6}}
ONE = Token("a", b"a", -0.5)
SEEN = Token("a", b"a", -0.5, [ONE] * 20)


def reply_of(path: str, body: dict) -> Reply:
    made = dialects.ENDPOINTS[path].reply
    assert made is not None
    return made(body, "req_1")


def test_vectors_are_kept_as_numbers_of_four_bytes():
    vector = [1 / (1 + at) for at in range(1000)]
    embeddings = OllamaEmbed({"model": "demo", "input": ["a"] * 500})
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            embeddings.event(Embedding(vector))
        assert tracemalloc.get_traced_memory()[0] - before < 500 * 1000 * 5
    finally:
        tracemalloc.stop()


def test_a_long_answer_is_written_in_pieces_between_which_others_run(server: Server):
    count = 200
    short, one = ask(server, "POST", "/api/embed", {"model": "demo", "input": ["a"]})
    long, many = ask(server, "POST", "/api/embed", {"model": "demo", "input": ["a"] * count})
    assert "Content-Length" in short.headers and "Transfer-Encoding" not in short.headers
    assert long.headers["Transfer-Encoding"] == "chunked"
    assert json.loads(many)["embeddings"] == json.loads(one)["embeddings"] * count


@pytest.mark.parametrize(
    "path, body, answers", WITH_LOGPROBS, ids=[one[0] for one in WITH_LOGPROBS]
)
def test_an_answer_ends_before_its_log_probabilities_are_too_many(
    path: str, body: dict, answers: int
):
    for limits in ({}, LIMITS):
        requests = reply_of(path, {**body, **limits}).requests
        most = sum((request.max_tokens or 10**9) * 21 for request in requests)
        assert len(requests) == answers and most <= reply.MAX_LOGPROBS
    without = {**body, "logprobs": None, "include": []}
    assert reply_of(path, {**without, **LIMITS}).requests[0].max_tokens == 10**6


@pytest.mark.parametrize("path, body, _", WITH_LOGPROBS, ids=[one[0] for one in WITH_LOGPROBS])
def test_what_is_kept_of_log_probabilities_counts(path: str, body: dict, _: int):
    whole, stream = (reply_of(path, {**body, "stream": stream}) for stream in (False, True))
    for one in (whole, stream):
        one.open(type("Accepted", (), {"id": "1", "prompt_tokens": 3, "cached_tokens": 0})())
        for _ in range(10):
            one.event(Text("a", [SEEN]))
    assert whole.held >= 10 * 21 * 500
    repeats = path == "/v1/responses"  # in the stream's last events
    assert stream.held == (whole.held if repeats else 0)


def test_an_answer_for_which_there_is_no_memory_fails(
    server: Server, serve: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reply, "LOGPROB_BYTES", 1 << 30)
    with Engine("demo") as engine:
        body = {**SAYS, "logprobs": True}
        response, text = ask(serve(engine), "POST", "/v1/chat/completions", body)
        assert response.status == 413 and b"fewer texts" in text
        streamed = ask(serve(engine), "POST", "/v1/chat/completions", {**body, "stream": True})
        assert streamed[0].status == 200 and b"[DONE]" in streamed[1]


def pieces(kind: str, part: bytes, count: int) -> bytes:
    """An image's file with so many more of some part of it."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, kind, progressive=True)
    content = file.getvalue()
    if part == b"scan":
        scans = [found.start() for found in re.finditer(b"\xff\xda", content)]
        return content[: scans[1]] + content[scans[0] : scans[1]] * count + b"\xff\xd9"
    start = {"PNG": 33, "GIF": content.index(b"\x2c"), "JPEG": 2}[kind]
    return content[:start] + part * count + content[start:]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("JPEG", b"scan"),
        ("JPEG", b"\xff\xe1\0\x12Exif\0\0" + b"a" * 10),
        ("JPEG", b"\xff\xfe\0\2"),
        ("PNG", b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4)),
        ("GIF", b"\x21\xfe\0"),
    ],
)
def test_an_image_of_a_great_many_parts_is_refused(kind: str, part: bytes):
    """Pillow copies what came before for some of them, and libjpeg goes through the whole image."""

    def fit(*size: int) -> tuple[int, ...]:
        return size

    assert read_pixels(pieces(kind, part, 100), fit, 3).shape == (64, 64, 3)
    with pytest.raises(InvalidRequest, match="an image"):
        read_pixels(pieces(kind, part, 60_000), fit, 3)


def test_an_image_that_takes_long_holds_up_no_other():
    begun, over = threading.Event(), threading.Event()

    def slow(*size: int) -> tuple[int, ...]:
        begun.set()
        assert over.wait(PATIENCE)
        return size

    with ThreadPoolExecutor() as pool:
        first = pool.submit(read_pixels, pieces("PNG", b"", 0), slow, 3)
        try:
            assert begun.wait(PATIENCE)
            second = pool.submit(read_pixels, pieces("PNG", b"", 0), lambda *size: size, 3)
            assert second.result(PATIENCE).shape == (64, 64, 3)
        finally:
            over.set()
        assert first.result().shape == (64, 64, 3)
