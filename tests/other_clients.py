"""Rounds through the clients that frameworks bring along: `python other_clients.py NAME URL` prints
"NAME ok"."""

import json
import os
import sys

NAME, URL = sys.argv[1:]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet for prices
BASH = {
    "type": "function",
    "function": {
        "name": "Bash",
        "description": "Runs a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}


def langchain(model) -> None:
    """An answer whole and streamed, then a call and its result."""
    from langchain_core.messages import HumanMessage, ToolMessage

    assert model.invoke("say hello").text == "hello"
    pieces = list(model.stream("count to 9"))
    assert len(pieces) > 5 and "".join(piece.text for piece in pieces) == "1 2 3 4 5 6 7 8 9"
    usage = next(piece.usage_metadata for piece in reversed(pieces) if piece.usage_metadata)
    assert usage["output_tokens"] >= 9
    tools, asked = model.bind_tools([BASH]), [HumanMessage("run ls")]
    whole, streamed = tools.invoke(asked), None
    for piece in tools.stream(asked):
        streamed = piece if streamed is None else streamed + piece
    for called in (whole, streamed):
        assert [(call["name"], call["args"]) for call in called.tool_calls] == [
            ("Bash", {"command": "ls"})
        ]
        result = ToolMessage("a.txt", tool_call_id=called.tool_calls[0]["id"])
        assert tools.invoke([*asked, called, result]).text == "The tool answered: a.txt"


def litellm(model: str, **where: str) -> None:
    """The same through litellm's one function."""
    from litellm import completion, stream_chunk_builder

    def ask(*messages: object, **fields: object):
        return completion(
            model=model, messages=list(messages), max_tokens=100, num_retries=0, **where, **fields
        )

    asked = {"role": "user", "content": "run ls"}
    assert ask({"role": "user", "content": "say hello"}).choices[0].message.content == "hello"
    pieces = list(ask({"role": "user", "content": "count to 9"}, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "1 2 3 4 5 6 7 8 9"
    for called in (
        ask(asked, tools=[BASH]),
        stream_chunk_builder(list(ask(asked, tools=[BASH], stream=True))),
    ):
        message = called.choices[0].message
        assert [
            (call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls
        ] == [("Bash", {"command": "ls"})]
        result = {
            "role": "tool",
            "tool_call_id": message.tool_calls[0].id,
            "name": "Bash",
            "content": "a.txt",
        }
        answer = ask(asked, message.model_dump(exclude_none=True), result, tools=[BASH])
        assert answer.choices[0].message.content == "The tool answered: a.txt", answer


match NAME:
    case "langchain-anthropic":
        from langchain_anthropic import ChatAnthropic

        langchain(
            ChatAnthropic(model="demo", base_url=URL, api_key="any", max_tokens=100, max_retries=0)
        )
    case "langchain-ollama":
        from langchain_ollama import ChatOllama

        langchain(ChatOllama(model="demo", base_url=URL, num_predict=100))
    case "litellm":
        litellm("anthropic/demo", api_base=URL, api_key="any")
        litellm("ollama_chat/demo", api_base=URL)
        litellm("openai/demo", api_base=f"{URL}/v1", api_key="any")
print(NAME, "ok")
