"""PDFs without text: their pages are images for a model that sees, and a note for others."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE
from PIL import Image
from test_content import document, messages, pdf
from vision_models import PICTURES, build_vision_model, picture

from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.images import scans
from _mlx_server.inference.images.images import image_mark
from _mlx_server.inference.images.pdf import MAX_DRAWN, PDFError, draw_pdf
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.wire import documents
from _mlx_server.wire.openai import OpenAIChat
from engine import Engine, Request

PAGES = [Image.fromarray(pixels) for pixels in PICTURES]
NOTE = "[document omitted: a PDF, which has 2 pages without text, as scans have]"


def scan(*pages: Image.Image) -> bytes:
    """A PDF that holds pictures alone."""
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    return file.getvalue()


SCAN = scan(*PAGES)


def ask(*files: bytes) -> Request:
    request = messages({"role": "user", "content": [document(file) for file in files]})
    request.model, request.max_tokens = "default", 4
    return request


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vision_model("qwen3_vl", tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(str(path)) as engine:
        yield engine


def test_the_pages_of_a_scan_are_images(engine: Engine):
    request = ask(SCAN)
    prompt = engine.renderer(engine.resolve("default")).prompt(request)
    text = engine.renderer(engine.resolve("default")).decode(prompt.tokens)
    seen = "<|vision_start|><|vision_end|>"
    assert f"hi\n[PDF, pages: 2]\n[page 1]\n{seen}\n[page 2]\n{seen}<" in text
    assert len({run.picture.token for run in prompt.images}) == 2
    generation = engine.submit(request)
    *_, done = generation
    assert done.usage.prompt_tokens == engine.count_tokens(request) == len(prompt.tokens)
    again = engine.submit(request)
    *_, done = again
    assert again.cached_tokens == again.prompt_tokens - 1
    file = {"file_data": document(SCAN)["source"]["data"], "filename": "a.pdf"}
    part = {"type": "file", "file": file}
    chat = OpenAIChat(
        {"model": "default", "messages": [{"role": "user", "content": [part]}]}
    ).request
    assert engine.count_tokens(chat) > 2 * 16


def test_who_does_not_see_gets_the_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    blind = PromptRenderer(describe("m", build_vision_model("qwen3_vl", tmp_path, tower=False)))
    with caplog.at_level("INFO"):
        assert f"hi\n{NOTE}" in blind.decode(blind.prompt(ask(SCAN)).tokens)
    assert NOTE in caplog.text
    monkeypatch.setattr(documents, "can_draw_pdf", lambda: False)
    request = ask(SCAN)
    assert request.messages[0]["content"] == f"hi\n{NOTE}" and not request.images


@pytest.mark.slow
def test_pages_look_like_the_pdf():
    pages, count = draw_pdf(SCAN)
    assert count == len(pages) == 2
    for page, original in zip(pages, PAGES, strict=True):
        drawn = Image.open(io.BytesIO(page)).convert("RGB")
        small = drawn.resize(original.size, Image.Resampling.BOX)
        pairs = zip(small.tobytes(), original.tobytes(), strict=True)
        assert sum(abs(a - b) for a, b in pairs) / len(small.tobytes()) < 25
    (large,), _ = draw_pdf(scan(Image.new("L", (4000, 8000), "white")))
    width, height = Image.open(io.BytesIO(large)).size
    assert width * height < 2.3e6 and abs(height / width - 2) < 0.01


@pytest.mark.slow
def test_pages_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    renderer = engine.renderer(engine.resolve("default"))
    long = scan(*[Image.fromarray(picture(10, 10, seed)) for seed in range(MAX_DRAWN + 2)])
    prompt = renderer.prompt(ask(long))
    assert len(prompt.images) == MAX_DRAWN
    limit = f"[all other pages omitted: at most {MAX_DRAWN} are shown]"
    assert limit in renderer.decode(prompt.tokens)
    monkeypatch.setattr(scans, "MAX_IMAGES", 2)
    other = scan(*[Image.fromarray(picture(10, 10, seed)) for seed in range(2)])
    prompt = renderer.prompt(ask(SCAN, other))  # the older one is a note
    assert len(prompt.images) == 2
    assert renderer.decode(prompt.tokens).index(NOTE) < prompt.images[0].start


@pytest.mark.slow
def test_time_and_memory_are_bounded():
    with pytest.raises(PDFError, match=r"takes more than 0.003 seconds"):
        draw_pdf(SCAN, seconds=0.001)
    with pytest.raises(PDFError, match="takes too much memory"):
        draw_pdf(SCAN, memory=2**24)
    [page], _ = draw_pdf(scan(Image.new("L", (20000, 20000), "white")), memory=2**28)
    assert page
    noise = Image.effect_noise((1500, 1400), 200)
    pages, count = draw_pdf(scan(*[noise] * 19), seconds=PATIENCE)
    assert count == 19 and len(pages) < 19


def sized(box: str) -> bytes:
    """A PDF with one empty page of another size."""
    return pdf("").replace(b"/MediaBox [0 0 612 792]", b"/MediaBox [%s]" % box.encode().ljust(11))


HOSTILE = {
    "cut": SCAN[: len(SCAN) // 2],
    "no pages": SCAN.replace(b"/Count 2", b"/Count 9"),
    "narrow": sized("0 0 9 99999"),
    "giant": sized("0 0 9e8 9e8"),
    "nothing": sized("0 0 0 0"),
    "negative": sized("9 9 -9 -9"),
    "no picture": SCAN.replace(b"/Subtype /Image", b"/Subtype /Nonee"),
    "false length": SCAN.replace(b"/Length ", b"/Length 9"),
    "another filter": SCAN.replace(b"/DCTDecode", b"/JPXDecode"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_scan_never_makes_a_request_fail(engine: Engine, name: str):
    began = time.monotonic()
    prompt = engine.renderer(engine.resolve("default")).prompt(ask(HOSTILE[name]))
    text = engine.renderer(engine.resolve("default")).decode(prompt.tokens)
    assert "[document omitted: " in text or "[PDF, pages: " in text
    assert time.monotonic() - began < 60


def test_marks_of_equal_scans_are_equal():
    first, second = ask(SCAN), ask(SCAN)
    assert first.messages == second.messages and first.images == second.images
    assert image_mark(SCAN) not in first.images
