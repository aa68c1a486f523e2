"""A round through an old version of the anthropic client: `python old_client.py URL` prints its
version and "ok"."""

import sys

import anthropic

client = anthropic.Anthropic(
    base_url=sys.argv[1], api_key="any", max_retries=0, _strict_response_validation=True
)
schema = {"type": "object", "properties": {"command": {"type": "string"}}}
ask = {
    "model": "demo",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "run ls"}],
    "tools": [{"name": "Bash", "description": "", "input_schema": schema}],
}
assert client.messages.create(**ask).content[-1].input == {"command": "ls"}
with client.messages.stream(**ask) as stream:
    final = stream.get_final_message()
assert final.content[-1].input == {"command": "ls"} and final.stop_reason == "tool_use"
result = {"type": "tool_result", "tool_use_id": final.content[-1].id, "content": "a.txt"}
ask["messages"] += [
    {"role": "assistant", "content": final.content},
    {"role": "user", "content": [result]},
]
assert client.messages.create(**ask).content[0].text == "The tool answered: a.txt"
counted = {key: value for key, value in ask.items() if key != "max_tokens"}
assert client.messages.count_tokens(**counted).input_tokens > 20
assert client.models.retrieve("demo").id == client.models.list().data[0].id == "demo"
try:
    client.messages.create(**{**ask, "model": "nope"})
except anthropic.NotFoundError:
    print(anthropic.__version__, "ok")
