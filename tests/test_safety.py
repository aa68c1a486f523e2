"""What docs/security.md says and no other file tests, in its order.

The others: test_security.py and test_http.py have web pages, other machines, framing, names and
paths; test_limits.py bodies, connections, logs and who manages; test_keys.py and test_activity.py
what keys see and share; test_hostile.py costs; test_watchdog.py what hangs; test_growth.py the
folder of the prompt cache; test_memories.py what is remembered."""

from __future__ import annotations

import argparse
import json
import logging
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
from jinja2.ext import loopcontrols
from models import CHATML, build_model
from parsing import tool
from test_http import ask, raw
from test_limits import HI, KEYS, call
from test_relay import Foreign, relay_to, running

from _mlx_server.front import body, budget, connections, sockets
from _mlx_server.front.cli import parse_arguments
from _mlx_server.front.options import api_key, cache_folder
from _mlx_server.inference.catalog import library
from _mlx_server.inference.catalog.models import describe
from _mlx_server.inference.pool import ModelPool
from _mlx_server.inference.prompt.chat_renderer import ChatRenderer
from _mlx_server.inference.prompt.conversations import ConversationMemory
from _mlx_server.inference.prompt.history import HistoryMemo
from _mlx_server.inference.prompt.renderer import PromptRenderer
from _mlx_server.inference.prompt.template import JSON_KEPT, Template
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import InvalidRequest, Priority
from _mlx_server.inference.speculation.quotable import Quotable
from engine import Engine

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
# Ways out of a template, as they are known. Outside of a sandbox each shows something of Python, or
# changes what it was given.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    '{{ lipsum.__globals__["os"].popen("echo \\<class").read() }}',
    "{{ lipsum.__globals__.__builtins__.eval('type(1)') }}",
    '{{ cycler.__init__.__globals__.os.popen("echo \\<class").read() }}',
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__init__.__globals__[os]}'.format(cycler) }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}'|string).format('') }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [cycler] | groupby('__init__.__globals__') }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__init__.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in (1,) %}{{ loop.__class__ }}{% endfor %}",
    "{{ (['a'] | map('upper')).gi_frame }}",
    "{{ (['a'] | select).gi_code }}",
    "{{ dict.mro() }}",
    "{{ ().__class__.__bases__[0] }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.__class__ }}",
    "{{ nothing.__class__.__init__.__globals__.__builtins__ }}",
    "{{ raise_exception.__globals__.__builtins__ }}",
    "{{ strftime_now.__globals__.__builtins__ }}",
    "{% set _ = messages.append({'role': 'user', 'content': '<class 2'}) %}{{ messages }}",
    "{% set _ = messages[0].update({'content': '<class 3'}) %}{{ messages }}",
]
SHOWN = ("<class", "<module", "<function", "<frame", "<code", "<jinja2", "__import__", "built-in")


def asked() -> list[dict]:
    return [{"role": "user", "content": "hello"}]


def test_without_flags_only_this_machine_is_served():
    """It listens on 127.0.0.1."""
    assert parse_arguments([]).host == "127.0.0.1"


REMEMBERED = (  # bytes
    ConversationMemory.MOST
    + HistoryMemo.REMEMBERED
    + TextTokenizer.REMEMBERED
    + ChatRenderer.ROOTS
    + JSON_KEPT
    + Quotable.REMEMBERED
    + 2 * (ChatRenderer.TEXTS + ChatRenderer.MARKUP)
)
WORDS = {1 / 4: "a quarter", 2: "two minutes", 5: "five minutes"}


@pytest.mark.parametrize(
    "said",
    [
        f"{sockets.MAX_HEAD >> 10} KB of head",
        f"{body.MAX_BODY >> 20} MB of body",
        f"{budget.BUDGET >> 20} MB for all bodies together",
        f"{WORDS[sockets.REQUEST_DEADLINE / 60]} to arrive",
        f"{connections.MAX_CONNECTIONS} connections",
        f"{WORDS[connections.ADDRESS_SHARE]} for one remote address",
        f"none has more than {library.MAX_NAME} characters",
        f"in the last {WORDS[ModelPool.KEPT / 60]}",
        f"about {round(REMEMBERED >> 20, -1)} MB for each key and model",
        f"A step that hangs for {WORDS[Engine.STUCK / 60]} ends the process",
    ],
)
def test_the_page_says_the_limits_that_there_are(said: str):
    """Each number of the page; other tests have smaller ones."""
    assert said in " ".join(PAGE.read_text().split())


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptRenderer]:
    path = tmp_path_factory.mktemp("model") / "m"
    yield PromptRenderer(describe("m", build_model("qwen2", path, template=CHATML)))


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_template_gets_out_of_its_sandbox(renderer: PromptRenderer, escape: str):
    """None of a model's code runs; templates run in a sandbox."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    free = jinja2.Environment(extensions=[loopcontrols])
    clock = {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    if "strftime_now" in escape:
        clock["strftime_now"] = raise_exception
    outside = free.from_string(escape).render(messages=asked(), **clock)
    assert [word for word in SHOWN if word in outside], "it is no escape"

    tokenizer, source = renderer.tokenizer, renderer.tokenizer.chat_template
    tokenizer.chat_template = escape
    try:
        template = Template(tokenizer)
        try:
            inside = template.render(asked(), [], {}, generation=True)
        except InvalidRequest:
            inside = ""
    finally:
        tokenizer.chat_template = source
    assert not [word for word in SHOWN if word in inside]


@pytest.mark.parametrize("place", ["format", "tools"])
def test_references_to_other_places_are_not_followed(demo: Engine, place: str):
    """URLs are never fetched."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        schema = {"type": "object", "properties": {"a": {"$ref": url}}, "$schema": url, "$id": url}
        fields = {"format": schema}
        if place == "tools":
            fields = {"tools": [tool("Bash", a={"$ref": url})], "strict": True}
        try:
            list(demo.chat("run ls", max_tokens=20, **fields))
        except InvalidRequest as error:
            assert place == "format" and "$ref" in str(error)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine("demo") as engine:
        yield engine


def test_nothing_is_kept_on_disk_without_a_cache_folder(tmp_path: Path, monkeypatch):
    """`--no-cache-dir` leaves nothing in the folder of the prompt cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(cache_folder(parse_arguments([]))).is_relative_to(tmp_path)
    assert cache_folder(parse_arguments(["--no-cache-dir"])) is None


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize("text", ["", " ", "=low", " =HIGH", "\t=normal"])
def test_a_blank_key_with_a_priority_opens_none_either(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be empty"):
        api_key(text)


def test_a_key_may_hold_anything_but_blanks_around_it():
    assert api_key(" a b =low") == ("a b", Priority.LOW)
    for text in ("a=b", "a=b=", "=a", "low", "a=lower"):
        assert api_key(text) == (text, Priority.NORMAL)
        assert api_key(f"{text}=high") == (text, Priority.HIGH)


FORMS = [
    (200, "x-api-key: bo=ss"),
    (200, "X-Api-Key:bo=ss"),
    (200, "x-api-key: \t bo=ss  \t"),
    (200, "Authorization: Bearer bo=ss"),
    (200, "authorization: BEARER   bo=ss "),
    (200, "x-api-key: other\r\nAuthorization: Bearer bo=ss"),
    (200, "x-api-key: bo=ss\r\nAuthorization: Basic other"),
    (200, "x-api-key: guest\r\nAuthorization: Bearer bo=ss"),
    (200, "Authorization: Bearer gr\xc3\xbcn"),
    (200, "Authorization: Bearer citt\xc3\xa0 "),
    (200, "x-api-key: citt\xc3\xa0"),
    (403, "x-api-key: guest"),
    (403, "x-api-key: guest\r\nx-api-key: bo=ss"),
    (403, "x-api-key: guest\r\nAuthorization: Bearer other"),
    (401, "x-api-key:"),
    (401, "x-api-key: BO=SS"),
    (401, "x-api-key: bo"),
    (401, "x-api-key: bo=ss, guest"),
    (401, "x-api-key: guest=low"),
    (401, "x-api-key: =?utf-8?q?bo=3Dss?="),
    (401, "x-api-key: other\r\nx-api-key: bo=ss"),
    (401, "Authorization: bo=ss"),
    (401, "Authorization: Basic bo=ss"),
    (401, "Authorization: Bearerbo=ss"),
    (401, "Authorization: Bearer gr\xfcn"),
    (401, "api-key: bo=ss"),
    (401, "Cookie: x-api-key=bo=ss"),
    (400, "x-api-key: bo=ss\0"),
]


def test_a_key_has_these_forms_and_no_other(demo: Engine, serve: Callable):
    keys = dict(map(api_key, ["bo=ss=high", "guest=low", "grün", "città"]))
    server = serve(demo, api_keys=keys)
    for status, fields in FORMS:
        request = f"GET /metrics?x-api-key=bo%3Dss HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n"
        answer = raw(server, f"{request}Connection: close\r\n\r\n".encode("latin-1"))
        assert answer.startswith(b"HTTP/1.1 %d " % status), fields


def test_a_preflight_request_needs_no_key(demo: Engine, serve: Callable):
    """Browsers send none with it; what follows needs one."""
    server = serve(demo, api_keys={"secret": Priority.NORMAL})
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "DELETE"}
    for path in ("/api/delete", "/v1/messages", "/activity/x"):
        assert ask(server, "OPTIONS", path, None, asked)[0].status == 204
        assert ask(server, "DELETE", path, {"model": "x"}, asked)[0].status == 401
        foreign = {**asked, "Origin": "http://foreign.example"}
        assert ask(server, "OPTIONS", path, None, foreign)[0].status == 403


@pytest.mark.parametrize("stream", [True, False])
def test_no_answer_gives_a_low_key_the_tokens_that_a_name_adds(
    demo: Engine, serve: Callable, stream: bool
):
    server = serve(demo, api_keys=KEYS)
    turns = [*HI, {"role": "assistant", "content": "hidden"}]
    for name, texts in (
        ("told", {"system": "hidden"}),
        ("shown", {"messages": turns}),
        ("bare", {}),
    ):
        made = {"model": name, "from": "demo", **texts}
        assert call(server, "boss", "/api/create", made)[0].status == 200
        for key in KEYS:
            body = {"model": name, "prompt": "hi", "stream": stream, "options": {"num_predict": 2}}
            response, text = call(server, key, "/api/generate", body)
            last = json.loads(text.splitlines()[-1])
            assert response.status == 200 and last["eval_count"] == 2
            assert ("context" in last) is (key != "guest" or not texts)


def test_nobody_asks_the_upstream_for_more_than_their_key_allows(demo: Engine):
    asked = ["", "high", "normal", "low"]
    with running(Foreign()) as foreign, relay_to(foreign.url, demo, api_keys=KEYS) as front:
        for key in ("guest", "agent", "boss"):
            for priority in asked:
                headers = {"x-api-key": key, **({"x-priority": priority} if priority else {})}
                body = {"model": "far", "messages": HI}
                assert ask(front, "POST", "/api/chat", body, headers)[0].status == 200
    given = [headers.get("x-priority", "") for _, headers, _ in foreign.seen]
    assert given[:4] == ["low"] * 4
    assert given[4:8] == ["", "normal", "normal", "low"] and given[8:] == asked


@pytest.mark.parametrize("name", ["far", "FAR:latest", "org/gguf:q4_k_m", "kimi:cloud"])
def test_nobody_takes_the_name_of_a_model_of_the_upstream(demo: Engine, name: str):
    with running(Foreign()) as foreign, relay_to(foreign.url, demo) as front:
        for path, body in [
            ("/api/create", {"model": name, "from": "demo", "system": "hidden"}),
            ("/api/copy", {"source": "demo", "destination": name}),
        ]:
            for more in ({}, {"Via": "1.1 mlx-server"}):
                response, text = ask(front, "POST", path, body, more)
                assert response.status == 400 and b"of the upstream" in text, (path, text)
    assert demo.preset(name) is None


def test_where_there_are_several_keys_nothing_is_quoted_to_those_who_manage(
    demo: Engine, caplog: pytest.LogCaptureFixture
):
    log = logging.getLogger("mlx_server")
    caplog.set_level(logging.INFO, "mlx_server")
    tools = [
        {"type": "hidden type"},
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    ]
    for keys in (KEYS, {"boss": Priority.HIGH}):
        with running(Foreign()) as foreign, relay_to(foreign.url, demo, api_keys=keys) as server:
            foreign.answer = lambda out: out(b"hidden words\r\n")
            log.addHandler(server.activity)
            try:
                body = {"model": "far", "messages": HI}
                assert call(server, "boss", "/api/chat", body)[0].status == 502
                body = {"model": "demo", "max_tokens": 1, "messages": HI, "tools": tools}
                assert call(server, "boss", "/v1/chat/completions", body)[0].status == 200
                text = call(server, "boss", "/activity", {}, "GET")[1]
            finally:
                log.removeHandler(server.activity)
        told = json.loads(text)
        assert "failed" in [row["ending"].partition(":")[0] for row in told["recent"]]
        assert "left out: " in told["warnings"][0]["message"]
        assert text.count("hidden") == (0 if len(keys) > 1 else 2)
