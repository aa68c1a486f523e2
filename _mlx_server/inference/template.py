"""A model's chat template, and what a canonical conversation needs before that template renders it
well."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from typing import Any

from _mlx_server.inference.protocol import InvalidRequest, Message
from _mlx_server.inference.schema import EMPTY_SCHEMA

log = logging.getLogger("mlx_server")


class Template:
    """A model's chat template, and what must be done to a canonical conversation before this
    template renders it well.

    The traits are found by probing with small conversations, never by the model's name, since
    templates of one family differ between conversions."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._compiled: Any = None
        self._compiled = self._compile()
        call = {"role": "assistant", "content": "", "tool_calls": [_probe_call("call00001")]}
        result = {"role": "tool", "tool_call_id": "call00001", "name": "probe", "content": "4711"}
        ask = {"role": "user", "content": "hello"}
        tools = [
            {
                "type": "function",
                "function": {"name": "probe_tool", "description": "x", "parameters": EMPTY_SCHEMA},
            }
        ]

        def renders(messages: list[Message], expect: str, tools: list[dict] | None = None) -> bool:
            try:
                text = self._apply(messages, tools, True, {})
            except Exception:  # templates raise whatever their author liked
                return False
            return all(word in text for word in expect.split())

        self.has_system = renders([{"role": "system", "content": "be brief 4711"}, ask], "4711")
        self.has_tools = renders([ask], "probe_tool", tools) and renders(
            [ask, call, result], "0815 4711", tools
        )
        self.user_after_tool = renders([ask, call, result, ask], "4711", tools)
        self.assistant_first = renders([{"role": "assistant", "content": "4711"}, ask], "4711")
        pair = {**call, "tool_calls": [_probe_call("call00001"), _probe_call("call00002", "1516")]}
        self.parallel_calls = renders(
            [ask, pair, result, {**result, "tool_call_id": "call00002"}], "0815 1516 4711", tools
        )
        long_id = "toolu_0123456789abcdefghijkl"
        long_call = {**call, "tool_calls": [_probe_call(long_id)]}
        self.short_ids = self.has_tools and not renders(
            [ask, long_call, {**result, "tool_call_id": long_id}], "4711", tools
        )
        self.reasoning_field = (
            "thinking"
            if (
                "reasoning_content" not in self._source
                and re.search(r"\.thinking\b|\[['\"]thinking['\"]\]", self._source)
            )
            else "reasoning_content"
        )
        self.text_beside_thought = renders(
            [ask, {**call, "content": "1", self.reasoning_field: "2"}, result], "0815", tools
        )

    def render(
        self,
        messages: list[Message],
        tools: list[dict],
        options: dict[str, Any],
        *,
        generation: bool,
    ) -> str:
        """The prompt's text. `generation` opens the assistant's turn; a final assistant message is
        left open instead. Raises InvalidRequest when the template refuses the conversation in every
        form."""
        messages = self._adapt(messages, tools)
        prefill = bool(
            generation
            and messages
            and messages[-1]["role"] == "assistant"
            and not messages[-1].get("tool_calls")
        )
        # Rendered with a mark behind it, since each template closes the turn in its own way
        if prefill:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + MARK}]
        error: Exception | None = None
        clock = {key: options[key] for key in options.keys() & {"strftime_now"}}
        effortless = {key: value for key, value in options.items() if key != "reasoning_effort"}
        # Templates raise on efforts they do not know or enable_thinking=False
        for kwargs in (options, effortless, clock):
            try:
                text = self._apply(
                    messages, tools if self.has_tools else None, generation and not prefill, kwargs
                )
                return text[: text.index(MARK)] if prefill else text
            except Exception as failure:
                error = error or failure
        log.warning("chat template failed: %s", error)
        raise InvalidRequest(f"the model's chat template cannot render this conversation: {error}")

    @property
    def shows_dates(self) -> bool:
        """Whether the template shows the present, and shows another date when it is given
        `strftime_now` as an option."""
        return self._compiled is not None and self.mentions("strftime_now")

    def mentions(self, option: str) -> bool:
        """Whether the template looks at an option."""
        return option in self._source

    def _compile(self) -> Any:
        """The template in transformers' own sandbox, if that can be had and renders as the
        tokenizer does, which first copies all that the template may see, and takes longer for it
        than for the rendering."""
        probe = [{"role": "user", "content": "a"}]
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            compiled = _compile_jinja_template(self._source)
            ours, theirs = (
                self._fill(compiled, probe, None, True, {}),
                self._apply(probe, None, True, {}),
            )
            # A clock may stand in them
            return compiled if re.sub(r"\d", "", ours) == re.sub(r"\d", "", theirs) else None
        except Exception:  # that function is not public, and a template may be anything
            return None

    def _apply(
        self, messages: list[Message], tools: list[dict] | None, generation: bool, options: dict
    ) -> str:
        if self._compiled is not None:
            return self._fill(self._compiled, messages, tools, generation, options)
        return self._tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=generation,
            tokenize=False,
            **options,
        )

    def _fill(
        self,
        compiled: Any,
        messages: list[Message],
        tools: list[dict] | None,
        generation: bool,
        options: dict,
    ) -> str:
        return compiled.render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=generation,
            **{
                **self._tokenizer.special_tokens_map,
                "enable_thinking": self._tokenizer.has_thinking,
                **options,
            },
        )

    def _adapt(self, messages: list[Message], tools: list[dict]) -> list[Message]:
        if not self.has_tools:
            messages = _tools_as_text(messages, tools)
        if not self.has_system and messages and messages[0]["role"] == "system":
            first, rest = messages[0], list(messages[1:])
            if rest and rest[0]["role"] == "user":
                rest[0] = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
            else:
                rest.insert(0, {"role": "user", "content": first["content"]})
            messages = rest
        out: list[Message] = []
        for message in messages:
            before = out[-1]["role"] if out else ""
            if (
                message["role"] == "assistant"
                and before in ("", "system")
                and not self.assistant_first
            ):
                out.append({"role": "user", "content": "(continued)"})
            if message["role"] == "user" and before == "tool" and not self.user_after_tool:
                out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{message['content']}"}
                continue
            if message.get("reasoning_content") and self.reasoning_field == "thinking":
                message = {**message, "thinking": message["reasoning_content"]}
                if (
                    message["content"]
                    and message.get("tool_calls")
                    and not self.text_beside_thought
                ):
                    message |= {
                        "content": "",
                        "thinking": f"{message['thinking']}\n\n{message['content']}",
                    }
            out.append(message)
        if not self.parallel_calls:
            out = _one_call_a_turn(out)
        return [_with_short_ids(message) for message in out] if self.short_ids else out


MARK = "\u2063\u2063end\u2063\u2063"
_TOOL_PROMPT = """You can call these tools:
{tools}
To call one, write only this, once per call:
<tool_call>
{{"name": "the tool's name", "arguments": {{...}}}}
</tool_call>"""


def _probe_call(call_id: str, number: str = "0815") -> dict:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "probe_tool", "arguments": {"number": number}},
    }


def _tools_as_text(messages: list[Message], tools: list[dict]) -> list[Message]:
    """For a template that knows no tools: definitions in the system message, calls and results in
    the Hermes form."""
    out: list[Message] = []
    if tools:
        text = _TOOL_PROMPT.format(
            tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        )
        system = (
            messages[0]["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
        )
        out.append({"role": "system", "content": system + text})
        messages = messages[1:] if system else messages
    for message in messages:
        if message.get("tool_calls"):
            calls = "\n".join(
                "<tool_call>\n%s\n</tool_call>" % json.dumps(call["function"], ensure_ascii=False)
                for call in message["tool_calls"]
            )
            content = f"{message['content']}\n{calls}" if message["content"] else calls
            message = {
                **{k: v for k, v in message.items() if k != "tool_calls"},
                "content": content,
            }
        if message["role"] == "tool":
            message = {
                "role": "user",
                "content": f"<tool_response>\n{message['content']}\n</tool_response>",
            }
        if out and message["role"] == "user" == out[-1]["role"]:
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n{message['content']}"}
        else:
            out.append(message)
    return out


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Splits an assistant's parallel calls into turns of one call, each followed by its result."""
    out: list[Message] = []
    placed: set[str] = set()
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            results = {
                m.get("tool_call_id"): m
                for m in itertools.takewhile(lambda m: m["role"] == "tool", messages[at + 1 :])
            }
            for number, call in enumerate(calls):
                out.append(
                    {
                        **(message if number == 0 else {"role": "assistant", "content": ""}),
                        "tool_calls": [call],
                    }
                )
                out += [results[call.get("id")]] if call.get("id") in results else []
            placed |= results.keys()
        elif not (message["role"] == "tool" and message.get("tool_call_id") in placed):
            out.append(message)
    return out


def _with_short_ids(message: Message) -> Message:
    """Ids of nine characters, which some templates insist on; a hash, so that a call and its result
    still agree."""

    def short(call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    if message.get("tool_calls"):
        return {
            **message,
            "tool_calls": [
                {**call, "id": short(call.get("id", ""))} for call in message["tool_calls"]
            ],
        }
    return (
        {**message, "tool_call_id": short(message.get("tool_call_id", ""))}
        if message["role"] == "tool"
        else message
    )


def plain_text(messages: list[Message]) -> str:
    """The conversation for a model without a chat template: base models continue plain text."""
    return "\n\n".join(message["content"] for message in messages)
