"""A model's chat template."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from _mlx_server.inference.bounded import BoundedMap, text_bytes, value_bytes
from _mlx_server.inference.prompt.adapter import adapt
from _mlx_server.inference.prompt.control_tokens import ControlTokens, unescape
from _mlx_server.inference.prompt.template_traits import find_traits
from _mlx_server.inference.protocol import InvalidRequest, Message

log = logging.getLogger("mlx_server")


class Template:
    """A model's chat template, which renders canonical conversations.

    Conversations are adapted to what the template can render, its `traits`. All their texts have
    to be escaped, see ControlTokens: of the control tokens in a rendered text, each is the
    template's own. `tokenizer` is mlx-lm's TokenizerWrapper."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._control_tokens = ControlTokens(tokenizer)
        self._json = WrittenJSON()
        self._compiled: Any = None
        self._compiled = self._compile()
        self.traits = find_traits(
            lambda messages, tools: self._apply(messages, tools, True, {}), self._source
        )

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: dict[str, Any],
        *,
        generation: bool,
    ) -> str:
        """The prompt's text for escaped messages and tools. With `generation` it ends with the
        beginning of the assistant's turn, or inside it if the last message is the assistant's and
        has no calls. `options` are variables for the template. Raises InvalidRequest when the
        template refuses the conversation with any of them."""
        messages = adapt(messages, tools, self.traits)
        last = messages[-1] if messages else {}
        prefill = generation and last.get("role") == "assistant" and not last.get("tool_calls")
        # Templates end a turn in their own ways, and some strip blanks: what follows the mark is
        # cut off again.
        if prefill:
            messages = [*messages[:-1], {**last, "content": last["content"] + _PREFILL_END}]
        clock = {key: options[key] for key in options.keys() & {"strftime_now"}}
        effortless = {key: value for key, value in options.items() if key != "reasoning_effort"}
        shown_tools = tools if self.traits.has_tools else None
        error: Exception | None = None
        # Some templates raise on efforts that they do not know or on enable_thinking=False
        for variables in (options, effortless, clock):
            try:
                text = self._apply(messages, shown_tools, generation and not prefill, variables)
                return text[: text.rindex(_PREFILL_END)] if prefill else text
            except Exception as failure:
                error = error or failure
        reason = unescape(str(error))
        log.warning("chat template failed: %s", reason)
        raise InvalidRequest(f"the model's chat template cannot render this conversation: {reason}")

    def on_trial(self) -> contextlib.AbstractContextManager[None]:
        """Of what is rendered within, nothing is kept if an exception leaves it."""
        return self._json.on_trial()

    def escape_messages(self, messages: list[Message]) -> list[Message]:
        """A conversation that can be rendered."""
        return list(map(self.escape_message, messages))

    def escape_message(self, message: Message) -> Message:
        """A message of a conversation that can be rendered."""
        return self._control_tokens.escape_message(message)

    def escape_tools(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tool definitions that can be rendered."""
        escaped: list[dict[str, Any]] = self._control_tokens.escape_value(tools)
        return escaped

    def escape(self, text: str) -> str:
        """A text as it stands in rendered conversations; `unescape` is the way back."""
        return self._control_tokens.escape(text)

    @property
    def shows_dates(self) -> bool:
        """Whether the template shows the date, and takes another clock as `strftime_now`."""
        return self._compiled is not None and self.mentions("strftime_now")

    def mentions(self, option: str) -> bool:
        """Whether a word, such as an option's name, is in the template."""
        return option in self._source

    def _compile(self) -> Any:
        """The template, compiled in transformers' own sandbox; None if that does not render what
        the tokenizer's own method renders. That method first copies all that the template may see,
        which takes longer than the rendering."""
        probe = [{"role": "user", "content": "a"}]
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            compiled = _compile_jinja_template(self._source)  # once: their method has it from there
            theirs = self._apply(probe, None, True, {})
            self._json = speed_up(compiled.environment)
            ours = self._fill(compiled, probe, None, True, {})
            # A clock may stand in them
            return compiled if re.sub(r"\d", "", ours) == re.sub(r"\d", "", theirs) else None
        except Exception:  # that function is not public, and a template may be anything
            return None

    def _apply(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        generation: bool,
        options: dict[str, Any],
    ) -> str:
        if self._compiled is not None:
            return self._fill(self._compiled, messages, tools, generation, options)
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=generation,
            tokenize=False,
            **options,
        )
        return text

    def _fill(
        self,
        compiled: Any,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        generation: bool,
        options: dict[str, Any],
    ) -> str:
        variables = {
            **self._tokenizer.special_tokens_map,
            "enable_thinking": self._tokenizer.has_thinking,
            **options,
        }
        text: str = compiled.render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=generation,
            **variables,
        )
        return text


def speed_up(environment: Any) -> WrittenJSON:
    """Gives a template's sandbox a short way to what most of the time of a long conversation goes
    to: the keys of messages, methods of texts, the state of loops. What the sandbox hides stays
    hidden: only what it would return unchanged is taken this way. The JSON of objects and lists is
    kept in what is returned: tools and calls come again as the same ones, which neither we nor
    templates change."""
    from jinja2.runtime import LoopContext

    if "getattr" in vars(environment):  # by an earlier call: each template has one sandbox
        earlier: WrittenJSON = environment.written_json
        return earlier
    sandboxed, undefined = environment.getattr, environment.undefined
    plain = {
        kind: {name for name in dir(kind) if not name.startswith(("_", "format"))}
        for kind in (str, LoopContext)
    }
    of_dict = set(dir(dict))

    def attribute(value: Any, name: str) -> Any:
        kind = type(value)
        if kind is dict and name not in of_dict:
            return value[name] if name in value else undefined(obj=value, name=name)
        if kind in plain and name in plain[kind]:
            return getattr(value, name)
        return sandboxed(value, name)

    to_json, written = environment.filters["tojson"], WrittenJSON()

    def known_json(value: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(value, (dict, list)):
            return to_json(value, *args, **options)
        key = f"{id(value)} {args} {options}"
        return written.get_or_make(key, value, lambda: to_json(value, *args, **options))

    environment.getattr, environment.filters["tojson"] = attribute, known_json
    environment.written_json = written
    return written


JSON_KEPT = 8 * 2**20  # bytes of JSON and of the values that it is of


class WrittenJSON:
    """The JSON of values, with the values, which so keep their ids. Thread-safe."""

    def __init__(self) -> None:
        self._kept: BoundedMap[tuple[Any, str]] = BoundedMap(JSON_KEPT, _json_bytes)
        self._trials = threading.local()

    def get_or_make(self, key: str, value: Any, make: Callable[[], str]) -> str:
        """The JSON of a value, by a key that its id is a part of."""
        trial = getattr(self._trials, "written", None)
        if trial is None:
            return self._kept.get_or_make(key, lambda: (value, make()))[1]
        known = self._kept.get(key) or trial.get_or_make(key, lambda: (value, make()))
        text: str = known[1]
        return text

    @contextlib.contextmanager
    def on_trial(self) -> Iterator[None]:
        """What this thread writes within is kept if no exception leaves it. A refused prompt's
        calls do not come again, and thousands of small objects keep the memory between them."""
        trial: BoundedMap[tuple[Any, str]] = BoundedMap(JSON_KEPT, _json_bytes)
        self._trials.written = trial
        try:
            yield
        finally:
            del self._trials.written
        for key, entry in trial.items():
            self._kept.put(key, entry)


def _json_bytes(key: str, entry: tuple[Any, str]) -> int:
    value, text = entry
    return sys.getsizeof(entry) + value_bytes(value) + text_bytes(key, text)


# Stands behind the message that the model is to continue
_PREFILL_END = "\u2063\u2063end\u2063\u2063"


def plain_text(messages: list[Message]) -> str:
    """The conversation for a model without a chat template: base models continue plain text."""
    return "\n\n".join(message["content"] for message in messages)
