"""A round through an old version of the anthropic client: `python old_client.py URL` prints its
version and "ok"."""

import sys

import anthropic

client = anthropic.Anthropic(
    base_url=sys.argv[1], api_key="any", max_retries=0, _strict_response_validation=True
)
ask = {
    "model": "demo",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "run ls"}],
    "tools": [
        {
            "name": "Bash",
            "description": "",
            "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}},
        }
    ],
}
assert client.messages.create(**ask).content[-1].input == {"command": "ls"}
with client.messages.stream(**ask) as stream:
    final = stream.get_final_message()
assert final.content[-1].input == {"command": "ls"} and final.stop_reason == "tool_use"
ask["messages"] += [
    {"role": "assistant", "content": final.content},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": final.content[-1].id, "content": "a.txt"}
        ],
    },
]
assert client.messages.create(**ask).content[0].text == "The tool answered: a.txt"
assert (
    client.messages.count_tokens(**{k: v for k, v in ask.items() if k != "max_tokens"}).input_tokens
    > 20
)
assert client.models.retrieve("demo").id == client.models.list().data[0].id == "demo"
try:
    client.messages.create(**{**ask, "model": "nope"})
except anthropic.NotFoundError:
    print(anthropic.__version__, "ok")
