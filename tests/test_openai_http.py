"""OpenAI's dialect over HTTP: raw requests, then the official client against a real server."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator

import ollama
import openai
import pytest
from conftest import Server
from openai_cases import BASH, CHAT, COMPLETIONS, RESPONSES, flat, user
from wire_cases import HI


def post(server: Server, path: str, body: object) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response, text


BAD = [  # path, what differs from a good body, the parameter that is blamed
    *(
        (path, {"model": model}, "model")
        for path in (CHAT, COMPLETIONS, RESPONSES)
        for model in (None, "", 5)
    ),
    *(
        (CHAT, fields, param)
        for fields, param in [
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": ["hi"]}, "messages.0"),
            ({"messages": [{"content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
            (
                {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
                "messages.0.content.0.type",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
                "messages.0.content.0.file",
            ),
            (
                {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
                "messages.1.tool_calls.0.function",
            ),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": "hot"}, "temperature"),
            ({"top_p": -1}, "top_p"),
            ({"n": 0}, "n"),
            ({"n": 1000}, "n"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_completion_tokens": -2}, "max_completion_tokens"),
            ({"stop": [1]}, "stop.0"),
            ({"seed": "x"}, "seed"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"5": 101}}, "logit_bias.5"),
            ({"logit_bias": []}, "logit_bias"),
            ({"logit_bias": {"999999": 1}}, None),
            ({"top_logprobs": 21}, "top_logprobs"),
            ({"logprobs": 1}, "logprobs"),
            ({"stream": "yes"}, "stream"),
            ({"stream_options": True}, "stream_options"),
            ({"tools": {}}, "tools"),
            ({"tools": [{"type": "function"}]}, "tools.0.name"),
            ({"tools": [{"type": "custom"}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": "maybe", "tools": [BASH]}, "tool_choice"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "Rm"}}, "tools": [BASH]},
                "tool_choice.function.name",
            ),
            ({"tool_choice": 5}, "tool_choice"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
                "response_format.json_schema.schema",
            ),
            ({"reasoning_effort": 5}, "reasoning_effort"),
        ]
    ),
    *(
        (COMPLETIONS, fields, param)
        for fields, param in [
            ({"prompt": None}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [["x"]]}, "prompt"),
            ({"prompt": [1, "x"]}, "prompt"),
            ({"prompt": [10**6]}, None),
            ({"prompt": [-1]}, None),
            ({"prompt": ["x"] * 99}, "prompt"),
            ({"echo": True}, "echo"),
            ({"suffix": "x"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"logprobs": 21}, "logprobs"),
        ]
    ),
    *(
        (RESPONSES, fields, param)
        for fields, param in [
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
            ({"input": [{"type": "item_reference"}]}, "input.0.id"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"background": True}, "background"),
            ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
            ({"tools": [{"type": "web_search"}]}, "tools"),
            ({"tools": [{"type": "custom", "name": []}]}, "tools.0.name"),
            ({"input": [{"type": "function_call_output", "output": 5}]}, "input.0.output"),
        ]
    ),
]
GOOD = {
    CHAT: {"model": "demo", "messages": user("say hello")},
    COMPLETIONS: {"model": "demo", "prompt": "x", "max_tokens": 2},
    RESPONSES: {"model": "demo", "input": "say hello"},
}


def test_bad_inputs_are_refused_in_openais_words_and_harm_nobody(server: Server):
    for path, fields, param in BAD:
        response, text = post(server, path, {**GOOD[path], **fields})
        error = json.loads(text)["error"]
        assert (response.status, error["type"], error["param"]) == (
            400,
            "invalid_request_error",
            param,
        ), (path, fields, error)
        assert error["message"] and error["code"] is None
        assert response.getheader("x-request-id").startswith("req_")
    for path in GOOD:
        for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100000):
            response, text = post(server, path, body)
            assert response.status == 400
            assert json.loads(text)["error"]["type"] == "invalid_request_error"
        assert post(server, path, GOOD[path])[0].status == 200


def frames(text: bytes) -> list[str]:
    return text.decode().removesuffix("\n\n").split("\n\n")


def test_frames(server: Server):
    for path in (CHAT, COMPLETIONS):
        response, text = post(server, path, {**GOOD[path], "stream": True})
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        *pieces, last = frames(text)
        assert last == "data: [DONE]" and all(
            json.loads(piece.removeprefix("data: "))["choices"] for piece in pieces
        )
    _, text = post(server, RESPONSES, {**GOOD[RESPONSES], "stream": True})
    for frame in frames(text):
        name, data = frame.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


@pytest.mark.slow
def test_a_silent_stream_says_that_it_is_alive(server: Server):
    since = len(server.lines)
    for path, body, sign in [
        (CHAT, {"messages": user("word " * 20000)}, b": ping\n"),
        (RESPONSES, {"input": "work " * 20000}, b"event: response.in_progress\n"),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", path, json.dumps({"model": "demo", "stream": True, **body}))
        lines = iter(connection.getresponse().readline, b"")
        signs = 1 if path == CHAT else 2  # the first one opens the stream
        while signs:
            signs -= next(lines) == sign
        connection.close()
        server.wait_for(f"{path} demo: .*client went away", since=since)


@pytest.mark.slow
def test_a_broken_stream_ends_with_an_error():
    server = Server("--drain", "0")
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    )
    streams = [
        client.chat.completions.create(model="demo", messages=user("word " * 20000), stream=True),
        client.responses.create(model="demo", input="work " * 20000, stream=True),
    ]
    first = [next(iter(stream)) for stream in streams]
    assert first[0].choices[0].delta.role == "assistant" and first[1].type == "response.created"
    assert server.stop() == 0
    with pytest.raises(openai.APIError, match="shutting down"):
        list(streams[0])
    *_, last = streams[1]
    assert last.type == "response.failed" and "shutting down" in last.response.error.message


PRIVET = "Привет! Я встроенная демо-модель. Я умею говорить, считать, читать, писать и запускать."


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_chat_whole_and_streamed_agree(client: openai.OpenAI):
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=user("Привет!"))
    assert raw.headers["x-request-id"].startswith("req_")
    whole = raw.parse()
    with client.chat.completions.stream(
        model="demo", messages=user("Привет!"), stream_options={"include_usage": True}
    ) as stream:
        final = list(stream) and stream.get_final_completion()
    assert whole.choices[0].message.content == final.choices[0].message.content == PRIVET
    assert whole.choices[0].finish_reason == final.choices[0].finish_reason == "stop"
    assert (
        whole.usage.total_tokens
        == final.usage.total_tokens
        == whole.usage.prompt_tokens + whole.usage.completion_tokens
    )


def test_cached_tokens_are_those_that_were_reused(client: openai.OpenAI):
    raw = [
        client.chat.completions.with_raw_response.create(model="demo", messages=user("count to 8"))
        for _ in range(2)
    ][-1]
    cached = raw.parse().usage.prompt_tokens_details.cached_tokens
    assert raw.headers["x-prompt-cache"].startswith(f"reused={cached};") and cached > 5


def test_chat_tools_round_trip(client: openai.OpenAI):
    messages = user("run ls and run pwd")
    with client.chat.completions.stream(model="demo", messages=messages, tools=[BASH]) as stream:
        choice = (list(stream) and stream.get_final_completion()).choices[0]
    calls = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    commands = [json.loads(call.function.arguments)["command"] for call in calls]
    assert commands == ["ls", "pwd"]
    whole = client.chat.completions.create(
        model="demo", messages=messages, tools=[BASH], parallel_tool_calls=False
    ).choices[0]
    assert [json.loads(call.function.arguments) for call in whole.message.tool_calls] == [
        {"command": "ls"}
    ]
    assert whole.message.content is None
    messages += [
        whole.message,
        {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "a!"},
    ]
    last = client.chat.completions.create(model="demo", messages=messages, tools=[BASH])
    assert last.choices[0].message.content == "The tool answered: a!"
    assert last.usage.prompt_tokens_details.cached_tokens > 0.8 * last.usage.prompt_tokens


def test_chat_thinking(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="demo", messages=user("think then say hello"), logprobs=True, top_logprobs=0
    )
    message = answer.choices[0].message
    assert message.content == "hello" and message.reasoning_content == message.reasoning != ""
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content) == b"hello"


def test_log_probabilities_are_those_of_the_visible_tokens(client: openai.OpenAI):
    asked = {
        "model": "demo",
        "messages": user("Привет!"),
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    parts = [
        (chunk.choices[0].delta.content, chunk.choices[0].logprobs.content)
        for chunk in chunks
        if chunk.choices[0].logprobs
    ]
    assert all(
        text.encode() == b"".join(bytes(token.bytes) for token in tokens) for text, tokens in parts
    )
    assert [token for _, tokens in parts for token in tokens] == whole
    assert b"".join(bytes(token.bytes) for token in whole) == PRIVET.encode()
    for token in whole:
        assert (
            token.top_logprobs[0].token == token.token
            and token.top_logprobs[0].logprob == token.logprob <= 0
        )
        assert (
            len(token.top_logprobs) == 3
            and sum(math.exp(one.logprob) for one in token.top_logprobs) < 1.01
        )
    stopped = client.chat.completions.create(
        model="demo", messages=user("count to 9"), stop="5 6", logprobs=True
    ).choices[0]
    assert (
        stopped.message.content
        == "1 2 3 4 "
        == "".join(token.token for token in stopped.logprobs.content)
    )


def test_ollamas_log_probabilities(server: Server):
    llama = ollama.Client(host=server.url)
    asked = {"model": "demo", "logprobs": True, "top_logprobs": 2}
    whole = llama.chat(**asked, messages=user("say a b"))
    assert "".join(token.token for token in whole.logprobs) == whole.message.content == "a b"
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in whole.logprobs)
    parts = list(llama.generate(**asked, prompt="say a b", stream=True))
    assert "".join(token.token for part in parts for token in part.logprobs or []) == "a b"
    assert llama.generate(model="demo", prompt="say a b").logprobs is None


def test_a_bias_can_demand_a_token_and_choices_differ_by_seed(client: openai.OpenAI):
    plain = client.completions.create(
        model="demo", prompt="def ", max_tokens=4, temperature=0, logprobs=2
    )
    biased = client.completions.create(
        model="demo",
        prompt="def ",
        max_tokens=4,
        temperature=0,
        logit_bias={"300": 100},
        logprobs=0,
    )
    assert set(biased.choices[0].logprobs.tokens) == {
        biased.choices[0].text[: len(biased.choices[0].text) // 4]
    }
    assert (
        biased.choices[0].text != plain.choices[0].text
        and plain.choices[0].finish_reason == "length"
    )
    assert plain.choices[0].logprobs.text_offset[:2] == [
        0,
        len(plain.choices[0].logprobs.tokens[0]),
    ]
    drawn = [
        [
            choice.text
            for choice in client.completions.create(
                model="demo", prompt=["def ", "class "], n=2, seed=3, temperature=2, max_tokens=8
            ).choices
        ]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def test_completions_take_text_and_tokens(client: openai.OpenAI):
    fields = {"model": "demo", "max_tokens": 5, "temperature": 0}
    one = client.completions.create(**fields, prompt="the word")
    # The strict one knows no pieces without a finish_reason
    lax = openai.OpenAI(base_url=client.base_url, api_key="any")
    pieces = list(lax.completions.create(**fields, prompt="the word", stream=True))
    assert "".join(chunk.choices[0].text for chunk in pieces) == one.choices[0].text
    assert pieces[-1].choices[0].finish_reason == one.choices[0].finish_reason == "length"
    both = client.completions.create(**fields, prompt=["the word", "a list"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == one.choices[0].text
    tokens = client.completions.create(**fields, prompt=[[300, 301, 302], [303]])
    assert tokens.usage.prompt_tokens == 4 and tokens.usage.completion_tokens == 10
    assert (
        client.completions.create(**fields, prompt=[303]).choices[0].text == tokens.choices[1].text
    )


def test_several_choices_stream_one_after_the_other(client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=user("say hello"),
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [
        "".join(
            chunk.choices[0].delta.content or ""
            for chunk in chunks[:-1]
            if chunk.choices[0].index == n
        )
        for n in range(3)
    ]
    assert texts == ["hello"] * 3 and chunks[-1].choices == []
    one = client.chat.completions.create(model="demo", messages=user("say hello")).usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        one.prompt_tokens,
        3 * one.completion_tokens,
    )


@pytest.mark.slow
def test_responses_round_trip(client: openai.OpenAI):
    conversation = user("run echo hello-from-mlx")
    with client.responses.stream(model="demo", input=conversation, tools=[flat(BASH)]) as stream:
        first = list(stream) and stream.get_final_response()
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "Bash",
        {"command": "echo hello-from-mlx"},
    )
    conversation += [
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "hello-from-mlx"},
    ]
    second = client.responses.create(model="demo", input=conversation, tools=[flat(BASH)])
    assert (
        second.output_text == "The tool answered: hello-from-mlx" and second.status == "completed"
    )
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    thought = client.responses.create(model="demo", input="think then say hello")
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    assert thought.output_text == "hello" and thought.output[0].summary[0].text
    assert thought.usage.output_tokens_details.reasoning_tokens > 0
    cut = client.responses.create(model="demo", input="count to 9", max_output_tokens=2)
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_errors_have_their_codes(client: openai.OpenAI):
    for ask in (
        lambda **fields: client.chat.completions.create(messages=HI, **fields),
        lambda **fields: client.responses.create(input="hi", **fields),
        lambda **fields: client.completions.create(prompt="hi", **fields),
    ):
        with pytest.raises(openai.NotFoundError, match="no-such:7b") as caught:
            ask(model="no-such:7b")
        assert caught.value.code == "model_not_found"
    with pytest.raises(
        openai.BadRequestError, match="maximum context length is 131072 tokens"
    ) as caught:
        client.chat.completions.create(model="demo", messages=user("a b " * 80000))
    assert caught.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI):
    assert "demo" in [model.id for model in client.models.list()]
    assert client.models.retrieve("demo").owned_by == "mlx"
