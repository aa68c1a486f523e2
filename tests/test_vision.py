"""Images: what the model computes of them, where they come from, what of them is reused, and files
that are none."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import kinds
from models import build_tokenizer
from PIL import Image
from test_text_is_text import FAMILIES
from vision_models import (
    CONFIGS,
    END,
    FOLDER,
    MISTRAL_MARKS,
    PAD,
    PICTURES,
    START,
    TEXT,
    build_vision_model,
    convert,
    picture,
    png,
)

from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.decoding.prefill import PromptReader
from _mlx_server.inference.decoding.weights import Weights
from _mlx_server.inference.group import Group
from _mlx_server.inference.images import images
from _mlx_server.inference.images.image_layout import MistralLayout, QwenLayout
from _mlx_server.inference.images.images import OLD, UNREADABLE, image_mark, read_pixels
from _mlx_server.inference.images.vision import Vision
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.sequence import State
from _mlx_server.wire.anthropic_request import count_request, messages_request
from _mlx_server.wire.ollama import OllamaChat, OllamaGenerate
from _mlx_server.wire.openai import OpenAIChat
from _mlx_server.wire.responses import OpenAIResponses
from engine import Done, Engine, InvalidRequest, Request, Sampling

FILES = [png(pixels) for pixels in PICTURES]
OTHER = png(picture(*PICTURES[1].shape[:2], 3))  # of the second one's size
KINDS = kinds("qwen3_vl", among=CONFIGS)
MANY = [kind for kind in CONFIGS if kind not in ("ministral3", "pixtral")]  # much is as in others
READ = {"name": "Read", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    for kind in CONFIGS:
        build_vision_model(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[Engine]:
    with Engine(str(models / "qwen3_vl")) as engine:
        yield engine


@pytest.fixture(scope="module", params=kinds("qwen3_vl", among=("qwen3_vl", "mistral3")))
def family(models: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine with a model of a family; its name is the kind."""
    with Engine(str(models / request.param)) as engine:
        yield engine


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def messages(*files: bytes, text: str = TEXT) -> list[dict]:
    return [{"role": "user", "content": "\n".join([*map(image_mark, files), text])}]


def shown(*files: bytes) -> dict[str, bytes]:
    return {image_mark(file): file for file in files}


def conversation(*files: bytes, text: str = TEXT, **fields) -> Request:
    fields = {"max_tokens": 24, **fields}
    return Request("default", messages(*files, text=text), images=shown(*files), **fields)


def finish(generation) -> Done:
    return list(generation)[-1]


def answer(engine: Engine, request: Request) -> list[int]:
    generation = engine.submit(request)
    return finish(generation).tokens[generation.prompt_tokens :]


def reference(kind: str) -> dict[str, np.ndarray]:
    return np.load(FOLDER / f"{kind}.npz")


def runs(engine: Engine) -> int:
    """How many images the tower has read."""
    return sum(runner.vision.runs for runner in engine.pool.runners.values())


# What the model computes


def load(path: Path) -> tuple[PromptRenderer, Weights, Vision]:
    local = describe("m", path)
    renderer, weights = PromptRenderer(local), Weights(local, None, Group())
    return renderer, weights, Vision(local, weights.model, renderer.image_layout)


def logits_of(path: Path, chunk: int) -> tuple[list[int], np.ndarray]:
    """The tokens of the prompt as the model reads them, and the logits behind each."""
    renderer, weights, vision = load(path)
    prompt = renderer.prompt(conversation(*FILES))
    cache, at, parts = weights.new_cache(), 0, []
    while at < len(prompt.tokens):
        end = vision.reach(prompt, at, min(at + chunk, len(prompt.tokens)))
        parts.append(np.array(vision.read(prompt, at, end, cache)[0]))
        at = end
    return vision.plain(prompt.tokens), np.concatenate(parts)


@pytest.mark.parametrize("chunk", [1000, pytest.param(37, marks=pytest.mark.slow)])
def test_the_logits_are_those_of_transformers(models: Path, kind: str, chunk: int):
    expected = reference(kind)
    tokens, logits = logits_of(models / kind, chunk)
    assert tokens == expected["prompt"].tolist()
    logits = logits[-len(expected["logits"]) :]
    assert np.abs(logits - expected["logits"]).max() <= 1e-4 * np.ptp(expected["logits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, chunk",
    [(kind, chunk) for kind in CONFIGS for chunk in (64, 100, 512) if chunk == 100 or kind in MANY],
)
def test_the_answer_is_that_of_transformers_and_nothing_is_read_twice(
    models: Path, kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cold, once more, beside other requests, with more turns, and after a restart."""
    monkeypatch.setattr(PromptReader, "CHUNK", chunk)
    expected = reference(kind)["answer"].tolist()
    with Engine(str(models / kind), cache_dir=tmp_path / "cache") as engine:
        others = [engine.chat(f"Count to {n}.", max_tokens=200) for n in (10, 100, 1000)]
        assert answer(engine, conversation(*FILES)) == expected
        beside = all(other.sequence.state is State.DECODE for other in others)
        for other in others:
            other.cancel()
        assert beside or engine.stats().totals.endings["error"] == 0
        assert runs(engine) <= 4  # an image on which a chunk ends may be read from its middle
        again = engine.submit(conversation(*FILES))
        assert finish(again).tokens[again.prompt_tokens :] == expected
        assert again.usage.cached_tokens >= again.prompt_tokens - 10
        assert engine.count_tokens(conversation(*FILES)) == again.prompt_tokens
        before = runs(engine)
        longer = conversation(*FILES)
        text = "".join(engine.submit(conversation(*FILES)).text())
        longer.messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And now?"},
        ]
        warm = engine.submit(longer)
        warm_answer = finish(warm).tokens[warm.prompt_tokens :]
        assert warm.usage.cached_tokens >= again.prompt_tokens
        assert runs(engine) == before
    with Engine(str(models / kind), cache_dir=tmp_path / "cache") as engine:
        restarted = engine.submit(longer)
        assert finish(restarted).tokens[restarted.prompt_tokens :] == warm_answer
        assert restarted.usage.cached_tokens >= again.prompt_tokens
        assert runs(engine) == 0


@pytest.mark.slow
def test_the_tower_reads_an_image_once(models: Path):
    with Engine(str(models / "qwen3_vl")) as engine:
        cold = answer(engine, conversation(*FILES))
        assert cold == reference("qwen3_vl")["answer"].tolist()
        assert runs(engine) == 2
        again = engine.submit(conversation(*FILES))
        assert finish(again).tokens[again.prompt_tokens :] == cold
        assert again.cached_tokens == again.prompt_tokens - 1 and runs(engine) == 2


@pytest.mark.slow
def test_another_image_of_the_same_size_is_another_one(models: Path, family: Engine):
    answer(family, conversation(*FILES, text="Which one?"))
    other = family.submit(conversation(FILES[0], OTHER, text="Which one?"))
    warm = finish(other).tokens[other.prompt_tokens :]
    first = family.count_tokens(conversation(FILES[0], text=""))
    assert other.cached_tokens <= first
    with Engine(str(models / family.default.name)) as fresh:
        assert answer(fresh, conversation(FILES[0], OTHER, text="Which one?")) == warm
    assert warm != answer(family, conversation(*FILES, text="Which one?"))


def test_images_in_mistrals_template(tmp_path: Path):
    """A token stands behind each row, where a text may stand; its name within a text is text."""
    build_vision_model("mistral3", tmp_path)
    template, special = FAMILIES["mistral"]
    marks = [*MISTRAL_MARKS, *special.split()]
    build_tokenizer(tmp_path, template, marks)
    renderer = PromptRenderer(describe("m", tmp_path))
    body = in_tool_result(FILES[0])
    body["messages"][0]["content"] = [*blocks(FILES[1]), {"type": "text", "text": "[IMG][IMG_END]"}]
    prompt = renderer.prompt(messages_request(body))
    breaks, ends = (prompt.tokens.count(token) for token in (START, END))
    assert [run.picture.placement.rows for run in prompt.images] == [8] * 8 + [6] * 6
    assert (PAD in prompt.tokens, breaks, ends) == (False, 7 + 5, 2)
    text = renderer.decode(prompt.tokens)
    image = "[IMG_BREAK]" * 7 + "[IMG_END]\n[IMG][IMG_END][/INST]"
    assert f"[INST]{image}" in text
    assert "\n" + "[IMG_BREAK]" * 5 + "[IMG_END]\n" in text


def test_the_same_image_twice(engine: Engine):
    generation = engine.submit(conversation(FILES[0], FILES[0]))
    before = runs(engine)
    once = engine.count_tokens(conversation(FILES[0]))
    assert generation.prompt_tokens > once + 48
    assert finish(generation).reason and runs(engine) <= before + 2


def test_penalties_formats_and_log_probabilities_beside_an_image(engine: Engine):
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.5, repetition_context=500)
    request = conversation(*FILES, sampling=sampling, logprobs=2)
    generation = engine.submit(request)
    done = finish(generation)
    assert done.usage.completion_tokens == 24
    assert done.tokens[: generation.prompt_tokens] == generation.sequence.prompt.tokens


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_cache(models: Path, bits: int):
    with Engine(str(models / "qwen3_vl"), kv_bits=bits) as engine:
        first = answer(engine, conversation(*FILES))
        assert len(first) == 24 and answer(engine, conversation(*FILES)) == first
        assert runs(engine) == 2


@pytest.mark.slow
def test_a_request_that_is_cancelled_within_an_image_goes_on_later(models: Path, monkeypatch):
    monkeypatch.setattr(PromptReader, "CHUNK", 20)
    with Engine(str(models / "qwen3_vl")) as engine:
        broken = engine.submit(conversation(*FILES))
        while runs(engine) == 0:
            next(broken)
        broken.cancel()
        assert answer(engine, conversation(*FILES)) == reference("qwen3_vl")["answer"].tolist()
        assert runs(engine) <= 3


# Weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3"])
def test_a_tower_in_mlx_form_that_is_quantised(models: Path, kind: str, tmp_path: Path):
    """As mlx-vlm writes it: other names, channels last, and some layers quantised."""

    def in_mlx_form(name: str, value: mx.array) -> tuple[str, mx.array]:
        if kind == "qwen3_vl":
            name = name.replace("model.visual.", "vision_tower.")
            name = name.replace("model.language_model.", "language_model.model.")
            name = name.replace("lm_head.", "language_model.lm_head.")
        else:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        kernel = name.endswith(("patch_embed.proj.weight", "patch_conv.weight"))
        return name, value.moveaxis(1, -1) if kernel else value

    layers = ("vision_tower.merger.linear", "multi_modal_projector.linear_2")
    build_vision_model(kind, tmp_path)
    convert(tmp_path, in_mlx_form, lambda name: name.startswith(layers), group_size=64)
    assert "vision" in describe("m", tmp_path).capabilities
    _, plain = logits_of(models / kind, 1000)
    _, logits = logits_of(tmp_path, 1000)
    assert 0 < np.abs(plain - logits).max() < 0.1 * np.ptp(plain)


def test_who_sees(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "vision" in describe("m", models / "qwen3_5").capabilities
    build_vision_model("qwen3_vl", tmp_path, tower=False)
    assert "vision" not in describe("m", tmp_path).capabilities
    build_vision_model("qwen3_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    config["text_config"].pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "vision" not in describe("m", tmp_path).capabilities
    monkeypatch.setattr("_mlx_server.inference.catalog.models.has_pillow", lambda: False)
    assert "vision" not in describe("m", models / "qwen3_vl").capabilities


def test_a_model_that_cannot_see_gets_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    renderer = PromptRenderer(describe("m", build_vision_model("qwen3_vl", tmp_path, tower=False)))
    with caplog.at_level("INFO"):
        prompt = renderer.prompt(conversation(FILES[0]))
    assert "[image omitted: this model cannot see images]\nWhat" in renderer.decode(prompt.tokens)
    assert "m cannot see images" in caplog.text


# Where images come from


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


def blocks(*files: bytes) -> list[dict]:
    return [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": encoded(file)},
        }
        for file in files
    ]


def parts(*files: bytes, kind: str = "image_url") -> list[dict]:
    urls = [f"data:image/png;base64,{encoded(file)}" for file in files]
    return [
        {"type": kind, "image_url": {"url": url} if kind == "image_url" else url} for url in urls
    ]


def bodies(*files: bytes) -> dict[str, dict]:
    """The same conversation in each API, by the path it is posted to."""
    text = {"type": "text", "text": TEXT}
    user = {"role": "user", "content": [*blocks(*files), text]}
    chat = {"role": "user", "content": [*parts(*files), text]}
    item = {
        "role": "user",
        "content": [*parts(*files, kind="input_image"), {**text, "type": "input_text"}],
    }
    native = {"role": "user", "content": TEXT, "images": list(map(encoded, files))}
    options = {"options": {"num_predict": 24}, "stream": False}
    return {
        "/v1/messages": {"model": "default", "max_tokens": 24, "messages": [user]},
        "/v1/chat/completions": {"model": "default", "max_tokens": 24, "messages": [chat]},
        "/v1/responses": {"model": "default", "max_output_tokens": 24, "input": [item]},
        "/api/chat": {"model": "default", "messages": [native], **options},
        "/api/generate": {
            "model": "default",
            "prompt": TEXT,
            "images": native["images"],
            **options,
        },
    }


def requests(*files: bytes) -> list[Request]:
    made = bodies(*files)
    return [
        messages_request(made["/v1/messages"]),
        OpenAIChat(made["/v1/chat/completions"]).request,
        OpenAIResponses(made["/v1/responses"]).request,
        OllamaChat(made["/api/chat"]).request,
        OllamaGenerate(made["/api/generate"]).request,
    ]


def in_tool_result(file: bytes) -> dict:
    """What Claude Code sends when its tool Read was used on an image."""
    call = {"type": "tool_use", "id": "t1", "name": "Read", "input": {"file_path": "a.png"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": blocks(file)}
    return {
        "model": "default",
        "max_tokens": 24,
        "tools": [READ],
        "messages": [
            {"role": "user", "content": "What is in a.png?"},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ],
    }


@pytest.mark.slow
def test_every_api_means_the_same(family: Engine):
    expected = reference(family.default.name)["answer"].tolist()
    for request in requests(*FILES):
        assert answer(family, request) == expected


def test_an_image_in_a_tool_result(family: Engine):
    seen = [answer(family, messages_request(in_tool_result(file))) for file in (FILES[1], OTHER)]
    assert seen[0] != seen[1]
    call = {"id": "t1", "type": "function", "function": {"name": "Read", "arguments": "{}"}}
    chat = {
        "model": "default",
        "messages": [
            {"role": "user", "content": "What is in a.png?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": parts(FILES[1])},
        ],
    }
    assert OpenAIChat(chat).request.messages[-1]["content"] == image_mark(FILES[1])


def test_tokens_are_counted_exactly(family: Engine):
    body = in_tool_result(OTHER)
    count = family.count_tokens(count_request({k: v for k, v in body.items() if k != "max_tokens"}))
    done = finish(family.submit(messages_request(body)))
    assert count == done.usage.prompt_tokens


@pytest.mark.parametrize(
    "size, most, placed",
    [
        ((1920, 1080), 1280, (47, 26)),
        ((3840, 2160), 1280, (47, 26)),
        ((5120, 2880), 1280, (47, 26)),
        ((1920, 1080), 4096, (60, 34)),
        ((1000, 10), 1280, (80, 1)),
        ((1, 1), 1280, (8, 8)),
    ],
)
def test_how_many_tokens_an_image_has(size: tuple[int, int], most: int, placed: tuple[int, int]):
    tower = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {
        "vision_config": tower,
        "image_token_id": 1,
        "vision_start_token_id": 2,
        "vision_end_token_id": 3,
    }
    found = QwenLayout(config, {}, {}, most).place(*size)
    assert (found.columns, found.rows) == placed
    assert (found.width, found.height) == (32 * found.columns, 32 * found.rows)


@pytest.mark.parametrize(
    "size, most, placed",
    [
        ((1920, 1080), 9999, (55, 31)),  # what PixtralProcessor makes of it
        ((1920, 1080), 1280, (47, 26)),
        ((5120, 2880), 1280, (47, 26)),
        ((300, 200), 1280, (11, 8)),
        ((4000, 20), 1280, (55, 1)),
        ((1, 1), 1280, (1, 1)),
        ((900, 900), 1, (1, 1)),
    ],
)
def test_how_many_tokens_an_image_has_for_mistral(
    size: tuple[int, int], most: int, placed: tuple[int, int]
):
    config = {
        "vision_config": {"patch_size": 14},
        "spatial_merge_size": 2,
        "image_token_index": 10,
    }
    names = {"[IMG_BREAK]": 12, "[IMG_END]": 13}
    layout = MistralLayout(config, {"size": {"longest_edge": 1540}}, names, most)
    found = layout.place(*size)
    assert (found.columns, found.rows) == placed
    assert (found.width, found.height) == (28 * found.columns, 28 * found.rows)
    tokens = layout.tokens(-7, found.rows, found.columns)
    assert tokens.count(12) == found.rows - 1 and tokens.count(-7) == found.rows * found.columns
    assert tokens[-1] == 13 and (len(tokens) <= most or placed == (1, 1))


# Files that are none


def fit(width: int, height: int) -> tuple[int, int]:
    return width, height


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_an_image_is_upright_and_white_where_it_is_transparent():
    red = Image.new("RGB", (4, 2), "red")
    red.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_pixels(saved(red, "PNG", exif=exif), fit, 0)
    assert turned.shape == (4, 2, 3) and turned[0, 1].tolist() == [0, 0, 255]
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert (read_pixels(saved(clear, "PNG"), fit, 3) == 255).all()
    moving = saved(red, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 2), "blue")])
    assert read_pixels(moving, fit, 3)[1, 1].tolist() == [255, 0, 0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, rows: int, bits: int = 8, color: int = 2) -> bytes:
    """A PNG that states a size and has some empty rows, up to 20 MB of them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    size = 1 + (width * bits * {0: 1, 2: 3, 3: 1, 6: 4}[color] + 7) // 8
    data = zlib.compress(bytes(min(size * rows, 20_000_000)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


JPEG = saved(Image.fromarray(PICTURES[0]), "JPEG")
WEBP = saved(Image.fromarray(PICTURES[0]), "WEBP")
GIF = saved(Image.fromarray(PICTURES[0]), "GIF")
HOSTILE = {
    "a bomb": png_of(10000, 10000, 10000, 1, 0),
    "larger than anything": png_of(2**31 - 1, 2**31 - 1, 1),
    "without width": png_of(0, 10, 1),
    "a line": png_of(20001, 100, 100),
    "rows that are not there": png_of(1000, 1000, 3),
    "cut PNG": FILES[0][: len(FILES[0]) // 2],
    "cut JPEG": JPEG[: len(JPEG) // 2],
    "cut WebP": WEBP[: len(WEBP) // 2],
    "cut GIF": GIF[:40],
    "a beginning alone": b"\x89PNG\r\n\x1a\n",
    "JPEG's beginning": b"\xff\xd8\xff",
    "GIF's beginning": b"GIF89a",
    "WebP's beginning": b"RIFF\x10\0\0\0WEBPVP8 ",
    "PNG with JPEG in it": FILES[0][:33] + JPEG,
    "large GIF": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + GIF[13:],
    "no palette": png_of(10, 10, 10, 8, 3),
    "zlib of nothing": FILES[0][:41] + bytes(100),
    "large JPEG": JPEG.replace(JPEG[JPEG.index(b"\xff\xc0") + 5 :][:4], b"\xff\xff\xff\xff", 1),
    "a text chunk of 100 MB": FILES[0][:33]
    + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    + FILES[0][33:],
    "endless profile": FILES[0][:33]
    + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    + FILES[0][33:],
}
# What the first two hold is not looked at; rows that are missing are black to Pillow
HARMLESS = ("a text chunk of 100 MB", "endless profile", "rows that are not there")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(engine: Engine, name: str):
    request = messages_request(bodies(HOSTILE[name])["/v1/messages"])
    before = engine.stats().waiting
    try:
        assert finish(engine.submit(request)).reason and name in HARMLESS
    except InvalidRequest as error:
        assert "image" in str(error) and len(str(error)) < 150
    if name not in HARMLESS:
        with pytest.raises(InvalidRequest):
            engine.count_tokens(request)
    assert engine.stats().waiting == before


def test_a_damaged_file_that_stays_in_a_conversation_is_a_note(engine: Engine):
    damaged = HOSTILE["cut PNG"]
    asked = conversation(damaged, max_tokens=1)
    answered = [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "Go on."}]
    further_back = dataclasses.replace(asked, messages=[*asked.messages, *answered])
    by_a_tool = messages_request(in_tool_result(damaged))
    for request in (further_back, by_a_tool):
        done = finish(engine.submit(request))
        assert UNREADABLE in engine.renderer(engine.default).decode(done.tokens)
    with pytest.raises(InvalidRequest):
        engine.submit(asked)


@pytest.mark.slow
def test_files_with_some_bytes_changed_are_refused_or_answered(engine: Engine):
    chance = random.Random(5)
    for number in range(200):
        content = bytearray((FILES[0], JPEG, WEBP, GIF)[number % 4])
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            request = messages_request(bodies(bytes(content))["/v1/messages"])
            request.max_tokens = 1
            assert finish(engine.submit(request)).reason
        except InvalidRequest as error:
            assert "image" in str(error)


def test_what_is_no_image_is_a_note(engine: Engine):
    for file in (b"", b"%!PS-Adobe", b"BM" + bytes(60), b"<svg/>", b"II*\0" + bytes(50)):
        request = messages_request(bodies(file)["/v1/messages"])
        assert not request.images and request.messages[0]["content"].startswith("[image omitted: ")


def test_too_many_images_of_a_user(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("_mlx_server.inference.images.pictures.MAX_IMAGES", 1)
    with pytest.raises(InvalidRequest, match="at most 1 images"):
        engine.submit(conversation(*FILES))


def session(count: int) -> Request:
    """A tool has read so many images, some of them twice, one after the other."""
    small = [png(picture(20, 20, seed % 5)) for seed in range(count)]
    said = [{"role": "user", "content": "Look."}]
    for number, file in enumerate(small):
        call = {"name": "Read", "arguments": {"path": str(number)}}
        one = {"id": f"call{number:05d}", "type": "function", "function": call}
        said += [
            {"role": "assistant", "content": "", "tool_calls": [one]},
            {"role": "tool", "tool_call_id": one["id"], "content": image_mark(file)},
        ]
    return Request("default", said, images=shown(*small), max_tokens=1)


def test_of_too_many_images_in_a_session_the_newest_are_shown(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """The oldest go in blocks, so that most turns begin as the turns before them."""
    monkeypatch.setattr("_mlx_server.inference.images.pictures.MAX_IMAGES", 6)
    renderer = engine.renderer(engine.resolve("default"))
    gone, kept, before = [], [], None
    for count in range(5, 14):
        prompt = renderer.prompt(session(count))
        gone.append(renderer.decode(prompt.tokens).count(OLD))
        assert len(prompt.images) == count - gone[-1] <= 6
        kept.append(before is not None and prompt.tokens[: len(before)] == before)
        before = prompt.tokens[: prompt.body]
    assert gone == [0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert [count for count, same in zip(gone[1:], kept[1:], strict=True) if not same] == [3, 6, 9]
    last = session(9)
    last.messages += [
        {"role": "assistant", "content": "Well."},
        {"role": "user", "content": "".join(last.images)},
    ]
    prompt = renderer.prompt(last)  # 14, of which the user has just sent 5
    assert renderer.decode(prompt.tokens).count(OLD) == 9 and len(prompt.images) == 5


def test_a_mark_of_another_process_is_text(engine: Engine):
    mark = image_mark(FILES[0])
    forged = str(int(mark[:24]) + 1) + mark[24:]
    request = conversation(FILES[0], text=forged)
    prompt = engine.renderer(engine.resolve("default")).prompt(request)
    assert len(prompt.images) == 1
    assert images.lasting(mark) != mark and images.lasting(forged) == forged


def test_an_owner_sees_what_others_see(engine: Engine):
    asked = [conversation(FILES[0], owner=owner) for owner in ("", "someone")]
    assert engine.count_tokens(asked[0]) == engine.count_tokens(asked[1])
    answers = [engine.submit(one) for one in asked]
    assert len({"".join(answer.text()) for answer in answers}) == 1
