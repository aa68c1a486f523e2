"""What stays in a conversation never makes a request fail: every block, part and item of the SDKs'
types, in every place where it may stand, and the files that clients send."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import anthropic.types
import anthropic.types.beta
import openai.types.chat
import openai.types.responses
import pytest
from conftest import Server, until
from sdk_samples import samples
from wire_cases import HI, brief

from _mlx_server.inference.images import pdf as pdf_process
from _mlx_server.inference.images.pdf import PDFError, read_pdf
from _mlx_server.wire import documents
from _mlx_server.wire.anthropic import AnthropicMessages
from _mlx_server.wire.fields import WireError
from _mlx_server.wire.openai import OpenAIChat
from _mlx_server.wire.responses import OpenAIResponses
from engine import Request

AFTER = {"role": "user", "content": "go on"}


def messages(*sent: dict) -> Request:
    return AnthropicMessages({"model": "m", "max_tokens": 9, "messages": [*HI, *sent]}).request


def everywhere(block: dict) -> list[dict]:
    """A conversation that has a block in each place where one may stand."""
    sent = []
    for role in ("user", "assistant", "system"):
        sent.append({"role": role, "content": [block]})
        sent.append({"role": role, "content": [{"type": "text", "text": "see"}, block]})
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block]}
    document = {"type": "document", "source": {"type": "content", "content": [block]}}
    found = {"type": "search_result", "source": "s", "title": "t", "content": [block]}
    for inner in ([result], [result, block], [block, result], [document], [found]):
        sent.append({"role": "assistant", "content": [call]})
        sent.append({"role": "user", "content": inner})
    return sent


@pytest.mark.parametrize(
    "blocks, least",
    [
        (anthropic.types.ContentBlockParam, 500),
        (anthropic.types.beta.BetaContentBlockParam, 2000),
    ],
    ids=["released", "beta"],
)
def test_no_block_is_refused(blocks: Any, least: int):
    count = 0
    for block in samples(blocks):
        request = messages(*everywhere(block), AFTER)
        assert request.messages[-1]["content"].endswith("go on")
        count += 1
    assert count > least


def test_no_message_of_a_chat_is_refused():
    count = 0
    for message in samples(openai.types.chat.ChatCompletionMessageParam):
        request = OpenAIChat({"model": "m", "messages": [*HI, message, AFTER]}).request
        assert request.messages[-1]["content"].endswith("go on")
        count += 1
    assert count > 100


def test_no_item_is_refused():
    seen: set[str] = set()
    for item in samples(openai.types.responses.ResponseInputItemParam):
        request = OpenAIResponses({"model": "m", "input": [*HI, item, AFTER]}).request
        assert request.messages[-1]["content"].endswith("go on")
        seen.add(item.get("type"))
    assert {"item_reference", "shell_call", "program", "computer_call_output"} < seen


@pytest.mark.parametrize("kind", ["never_heard_of", "x" * 5000, "a\nb"])
def test_unknown_types_become_notes(kind: str):
    name = " ".join(kind.split())[:200]
    note = f"[{name} omitted: this server cannot use it]"
    said = json.dumps(messages(*everywhere({"type": kind, "more": [1]})).messages)
    assert said.count(note) == 13
    part = {"role": "user", "content": [{"type": kind}]}
    chat = OpenAIChat({"model": "m", "messages": [part]}).request
    assert brief(chat.messages) == [("user", note)]
    for item in (part, {"type": kind}):
        response = OpenAIResponses({"model": "m", "input": [item]}).request
        assert brief(response.messages) == [("user", note)]


def test_a_note_is_short_whatever_a_file_says_it_is():
    kind = "x/" + "y" * 5000
    note = f"[document omitted: a file of type {kind[:100]}, which this server cannot read]"
    assert shown(b"\0", kind) == note
    file = {"type": "file", "file": {"file_data": f"data:{kind};base64,AA=="}}
    chat = OpenAIChat({"model": "m", "messages": [{"role": "user", "content": [file]}]}).request
    assert brief(chat.messages) == [("user", note)]


# ---- files


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", FONT]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(f"{PAGE} /Contents {len(objects)} 0 R >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    table = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write(b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R >>"
    out.write(f"trailer\n{trailer}\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


FONT = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
PAGE = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792]"
PAGE += " /Resources << /Font << /F1 3 0 R >> >>"
HELLO = pdf("Hello", "World")
HELLO_TEXT = "[PDF, pages: 2]\n[page 1]\nHello\n[page 2]\nWorld"


def encrypted(password: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(HELLO))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def document(data: bytes, media_type: str = "application/pdf", **fields: str) -> dict:
    text = base64.b64encode(data).decode()
    source = {"type": "base64", "media_type": media_type, "data": text}
    return {"type": "document", "source": source, **fields}


def shown(data: bytes, media_type: str = "application/pdf", **fields: str) -> str:
    """What the model sees of a document."""
    block = document(data, media_type, **fields)
    return messages({"role": "user", "content": [block]}).messages[0]["content"][len("hi\n") :]


def test_the_text_of_a_pdf_is_read_wherever_it_stands():
    said = json.dumps(messages(*everywhere(document(HELLO))).messages)
    assert said.count(json.dumps(HELLO_TEXT)[1:-1]) == 13
    data = base64.b64encode(HELLO).decode()
    url = f"data:application/pdf;base64,{data}"
    for file in ({"file_data": data}, {"file_data": url}, {"file_data": url, "filename": "a.pdf"}):
        chat = [{"role": "user", "content": [{"type": "file", "file": file}]}]
        response = [{"role": "user", "content": [{"type": "input_file", **file}]}]
        read = "\n".join(filter(None, [file.get("filename"), HELLO_TEXT]))
        assert brief(OpenAIChat({"model": "m", "messages": chat}).request.messages) == [
            ("user", read)
        ]
        assert brief(OpenAIResponses({"model": "m", "input": response}).request.messages) == [
            ("user", read)
        ]


@pytest.mark.parametrize(
    "data, why",
    [
        (pdf("", ""), "has 2 pages without text, as scans have"),
        (encrypted("secret"), "is encrypted"),
        (b"%PDF-1.4 and no more", "is damaged or no PDF"),
        (HELLO[:200], "is damaged or no PDF"),
        (b"GIF89a", "is damaged or no PDF"),
    ],
    ids=["scan", "encrypted", "no pdf", "cut", "gif"],
)
def test_a_pdf_that_cannot_be_read_becomes_a_note(
    data: bytes, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents, "can_draw_pdf", lambda: False)
    assert shown(data) == f"[document omitted: a PDF, which {why}]"
    named = shown(data, title="My\nreport", context="new")
    assert named == f"My\nreport\nnew\n[document omitted: My report: a PDF, which {why}]"


def test_an_encrypted_pdf_without_a_password_is_read():
    assert shown(encrypted("")) == HELLO_TEXT


def test_without_the_extra_a_pdf_becomes_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "can_read_pdf", lambda: False)
    why = "which this server cannot read without its extra 'documents'"
    assert shown(pdf("unread")) == f"[document omitted: a PDF, {why}]"


def test_pages_and_characters_are_bounded():
    limits = "at most 100 pages and 100,000 characters are read"
    read = shown(pdf(*(f"number {number}" for number in range(1, 103))))
    assert read.startswith("[PDF, pages: 102]\n[page 1]\nnumber 1\n")
    assert read.endswith(f"[page 100]\nnumber 100\n[all other pages omitted: {limits}]")
    read = shown(pdf("a", "b" * 200_000, "c"))
    assert read.count("b") == 100_000 - len("a") and "[page 3]" not in read
    assert read.endswith(f"b\n[the rest of page 2 and what follows omitted: {limits}]")


def test_time_and_memory_are_bounded():
    with pytest.raises(PDFError, match=r"takes more than 0.003 seconds to read"):
        read_pdf(HELLO, seconds=0.001)
    with pytest.raises(PDFError, match="takes too much memory"):
        read_pdf(HELLO, memory=2**20)
    bomb = zlib.compress(bytes(70 * 2**20), 9)
    head, tail = pdf("Hello").split(b"<< /Length", 1)
    tail = tail[tail.index(b"endstream") :]
    stream = b"<< /Filter /FlateDecode /Length %d >>\nstream\n%s\n" % (len(bomb), bomb)
    with pytest.raises(PDFError, match="takes too much memory"):
        read_pdf(head + stream + tail, memory=150 * 2**20)


def test_the_process_that_reads_a_pdf_lets_others_go_first():
    command = [sys.executable, "-P", pdf_process.__file__, "text", "60", str(1 << 30)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        own = os.getpriority(os.PRIO_PROCESS, 0)  # at 19 there is nobody to let go first
        until(lambda: os.getpriority(os.PRIO_PROCESS, process.pid) > min(own, 18))
        out, _ = process.communicate(HELLO)  # it had not begun to read it
    assert b"Hello" in out


def test_a_process_that_holds_much_memory_reads_a_pdf():
    program = f"""
from _mlx_server.inference.images.pdf import read_pdf
held = bytearray(b"x" * (300 << 20))  # as the server holds a model's weights
print(read_pdf({HELLO!r}, memory=256 << 20))"""
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "Hello" in out.stdout


def test_the_process_that_reads_a_pdf_gets_no_key_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A parser that a file has taken over, as a module that is found before the real one."""
    (tmp_path / "pypdf.py").write_text("""
import os, pathlib, sys
class PdfReader:
    is_encrypted = False
    def __init__(self, file):
        class Page:
            def extract_text(self):
                try:
                    written = (pathlib.Path(sys.path[0]) / "left").write_text("x")
                except OSError:
                    written = 0
                return f"{sorted(os.environ)} {os.getcwd()} {written}"
        self.pages = [Page()]
""")
    for name in ("MLX_SERVER_API_KEY", "HF_TOKEN", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    read = read_pdf(HELLO)
    assert "PYTHONPATH" in read and read.endswith("/ 0")
    assert "KEY" not in read and "TOKEN" not in read


FAKE_PARSER = """
import resource
class PdfReader:
    is_encrypted = False
    def __init__(self, file):
        class Page:
            def extract_text(self):
                return f"CPU {resource.getrlimit(resource.RLIMIT_CPU)[0]} CODE"
        self.pages = [Page()]
"""


def test_modules_are_found_from_the_folder_of_the_server_and_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pypdf.py").write_text(FAKE_PARSER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert read_pdf(HELLO, seconds=20).endswith("CPU 21 CODE")
    assert list((tmp_path / "compiled").rglob("pypdf.*.pyc"))


def test_a_pdf_is_read_once(monkeypatch: pytest.MonkeyPatch):
    reads = []

    def count(data: bytes) -> str:
        reads.append(data)
        return "text"

    monkeypatch.setattr(documents, "read_pdf", count)
    data = pdf("read once")
    assert [shown(data), shown(data, title="T")] == ["text", "T\ntext"] and reads == [data]


def test_a_pdf_that_takes_long_holds_no_other_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first one's process waits until it is let go."""
    gate, began, python = (tmp_path / name for name in ("gate", "began", "python"))
    os.mkfifo(gate)
    run = shlex.join([sys.executable])
    python.write_text(f'#!/bin/sh\nmkdir {began} && cat {gate} >&2\nexec {run} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(shown, pdf("takes long"))
        for _ in range(1000):
            if began.exists():
                break
            time.sleep(0.01)
        assert began.exists()
        assert "is short" in shown(pdf("is short")) and not first.done()
        gate.write_text("go")
        assert "takes long" in first.result()


@pytest.mark.parametrize(
    "data, media_type, text",
    [
        ("héllo".encode(), "text/plain", "héllo"),
        ("héllo".encode("utf-16"), "text/plain; charset=utf-16", "héllo"),
        ("héllo".encode("cp1252"), "text/plain", "héllo"),
        (b"\xef\xbb\xbf# A", "text/markdown", "# A"),
        (b"<p>A</p>", "text/html", "<p>A</p>"),
        (b"<p/>", "application/xhtml+xml", "<p/>"),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
        (b'{"a": 1}', "application/vnd.api+json", '{"a": 1}'),
        (b"%PDF- is how it begins", "text/plain", "%PDF- is how it begins"),
        (b"print(1)", "application/octet-stream", "print(1)"),
        (b"print(1)", "", "print(1)"),
        (
            b"PK\x03\x04\xff",
            "application/zip",
            "[document omitted: a file of type application/zip, which this server cannot read]",
        ),
        (b"\0", "", "[document omitted: a file of an unknown type, which this server cannot read]"),
    ],
)
def test_text_in_base64_is_text(data: bytes, media_type: str, text: str):
    assert shown(data, media_type) == text


@pytest.mark.parametrize("data", ["A", "data:,x", "AAAA!", "=AAA", "é"])
def test_what_is_not_base64_is_refused(data: str):
    block = {"type": "document", "source": {"type": "base64", "data": data}}
    with pytest.raises(WireError, match=r"content.0.source.data: Input should be valid base64"):
        messages({"role": "user", "content": [block]})
    part = {"type": "input_file", "file_data": data}
    if not data.startswith("data:"):
        with pytest.raises(WireError, match=r"content.0.file_data: Input should be valid base64"):
            OpenAIResponses({"model": "m", "input": [{"role": "user", "content": [part]}]})


def test_an_omission_is_logged_once(caplog: pytest.LogCaptureFixture):
    block = {"type": "container_upload", "file_id": "file_once"}
    with caplog.at_level(logging.INFO, "mlx_server"):
        for _ in range(3):
            messages({"role": "user", "content": [block]})
    assert [record.message for record in caplog.records] == [
        "messages.1.content.0: [file omitted: file_once: it is kept elsewhere, and this server "
        "does not fetch it]"
    ]


def test_a_session_with_a_pdf_goes_on_and_is_append_only(server: Server):
    """What Claude Code sends after it has read a PDF."""
    call = {"type": "tool_use", "id": "1", "name": "Read", "input": {"path": "a.pdf"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "PDF file read: a.pdf"}
    sent = [
        {"role": "user", "content": "read a.pdf"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, document(HELLO)]},
    ]
    client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    first = client.messages.create(model="demo", max_tokens=9, messages=sent)
    sent += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "say a"}]
    usage = client.messages.create(model="demo", max_tokens=9, messages=sent).usage
    before = first.usage.input_tokens + first.usage.output_tokens
    assert usage.cache_read_input_tokens >= before - 4
