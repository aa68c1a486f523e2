"""From a request to the tokens that the model reads."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.constraint import Constraint, ThinkingBudget, grammar_error
from _mlx_server.inference.families import HERMES, detect_format
from _mlx_server.inference.grammar import json_rule
from _mlx_server.inference.models import LocalModel, gap_marks, generation_defaults, load_error
from _mlx_server.inference.protocol import InvalidRequest, Message, Request, first_line
from _mlx_server.inference.schema import has_finite_value
from _mlx_server.inference.template import MARK, Template, plain_text

log = logging.getLogger("mlx_server")


@dataclass
class Prompt:
    """A rendered request. `tokens` are what the model reads. `root`, `turn` and `body` are token
    counts that later prompts are likely to share: the end of system and tools, the beginning of
    what the user says last, and the end before the generation prompt; 0 where there is none.
    `opening` is text that the prompt already holds of the answer (a forced tool call's opener),
    `in_thinking` that it ends inside thinking."""

    tokens: list[int]
    root: int = 0
    turn: int = 0
    body: int = 0
    opening: str = ""
    in_thinking: bool = False


@dataclass
class Answer:
    """What the model really wrote in one turn: all its tokens but the end token, its thinking (""
    if it did not think) and the text after it."""

    tokens: list[int]
    visible: str
    thinking: str


class PromptRenderer:
    """What a model needs to talk apart from its weights: tokenizer, chat template, output format,
    sampling defaults.

    Building one reads files but no weights and touches no MLX array, so it happens on the caller's
    thread, and whatever is wrong with a request is known before any work is queued.

    It also remembers the model's answers, by tool-call id or by text, and puts their very tokens
    into later prompts: clients re-serialise tool inputs, templates re-format them, and text need
    not tokenise as it was generated, but the KV cache is only good for what was generated."""

    REMEMBERED = 4096  # answers, and beginnings of conversations

    def __init__(self, local: LocalModel):
        from mlx_lm.utils import load_tokenizer
        from transformers import CONFIG_MAPPING, PreTrainedConfig

        try:
            # A type that only mlx-lm knows would be checked, and maybe refused, by rules for
            # others; the tokenizer does not need it.
            known = local.config.get("model_type") in CONFIG_MAPPING
            # Left open, trust would be asked for on the terminal.
            options = {
                "trust_remote_code": False,
                **({} if known else {"config": PreTrainedConfig()}),
            }
            self.tokenizer = load_tokenizer(
                local.path, options, eos_token_ids=local.config.get("eos_token_id")
            )
        except Exception as error:
            raise load_error(local, f"the tokenizer of model '{local.name}'", error) from error
        self.template = Template(self.tokenizer) if self.tokenizer.has_chat_template else None
        self.format = detect_format(self.tokenizer)
        if self.template and not self.template.has_tools:
            self.format = dataclasses.replace(
                HERMES,
                thinking=self.format.thinking,
                structural_markers=self.format.structural_markers,
            )
        self.defaults = generation_defaults(local.path)
        self._structural_markers = _any_of(self.format.structural_markers)
        ends = [text for text in map(self.tokenizer.decode, self.tokenizer.eos_token_ids) if text]
        pattern = _any_of(ends).pattern
        # It may end the turn, too
        if self.format.thinking and self.format.thinking[1] in self.format.structural_markers:
            pattern += (
                f"|{re.escape(self.format.thinking[1])}(?!{self._structural_markers.pattern})"
            )
        self._turn_end = re.compile(pattern)
        self._answers: dict[str, Answer] = {}
        self._roots: dict[str, int] = {}
        self._openers: dict[str, str] = {}
        self._births: dict[str, datetime.datetime] = {}
        self._specials = self._splittable()
        self._encode_piece = functools.lru_cache(2048)(self._encode_whole)

    def encode(self, text: str) -> list[int]:
        """A rendered template's text to token ids. What stands between two special tokens is
        tokenised once and remembered, so that a prompt that has grown costs no more than its
        growth."""
        if self._specials is None:
            return self._encode_whole(text)
        return list(
            itertools.chain.from_iterable(
                map(self._encode_piece, filter(None, self._specials.split(text)))
            )
        )

    def _encode_whole(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _splittable(self) -> re.Pattern | None:
        """A pattern that cuts text at the special tokens, if this tokenizer treats the pieces
        independently."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        names = [
            t.content
            for t in added
            if not (t.lstrip or t.rstrip or t.single_word or t.normalized) and t.content.strip()
        ]
        if not names:
            return None
        pattern = re.compile(
            "(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"
        )
        probe = f" a{names[0]} b\n{names[-1]}\nc  d{names[0]}{names[-1]} é"
        pieces = [
            token for piece in pattern.split(probe) if piece for token in self._encode_whole(piece)
        ]
        return pattern if pieces == self._encode_whole(probe) else None

    def prompt(self, request: Request) -> Prompt:
        """Renders and tokenises a request. Raises InvalidRequest when the template refuses it."""
        if request.prompt is not None or self.template is None:
            raw = request.prompt if request.prompt is not None else plain_text(request.messages)
            if request.suffix:
                raw = "".join(
                    itertools.chain(
                        *itertools.zip_longest(self._gap(), (raw, request.suffix), fillvalue="")
                    )
                )
            return Prompt(
                request.context + (self.tokenizer.encode(raw) if isinstance(raw, str) else raw)
            )
        tools = request.tools if request.tool_choice != "none" else []
        options = self._options(request)
        messages, answers = self._recall(request.messages)
        text = self.template.render(messages, tools, options, generation=True)
        # A template that drops text beside calls
        if lost := {mark for mark in answers if mark not in text}:
            messages, answers = self._recall(request.messages, lost)
            text = self.template.render(messages, tools, options, generation=True)
        opener = self._opener(messages, tools, options, text)
        opening = self.format.call_prefix(request.tool_choice) if tools else ""
        start = (self.format.thinking or ("",))[0]
        tokens = request.context + self._splice(text, answers, opener) + self._encode_whole(opening)
        return Prompt(
            tokens,
            root=self._root(request.messages, tools, options, text, len(tokens)),
            turn=self._turn(messages, text, len(tokens)),
            body=len(tokens) - len(self.encode(opener)) - len(self._encode_whole(opening))
            if opener
            else 0,
            opening=opening,
            in_thinking=bool(start) and not opening and text.rstrip().endswith(start),
        )

    def _gap(self) -> tuple[str, ...]:
        marks = gap_marks(token.content for token in self.tokenizer.added_tokens_decoder.values())
        if not marks:
            raise InvalidRequest(
                "this model cannot fill a gap: its tokenizer has no tokens for that"
            )
        return marks

    def truncated(self, prompt: Prompt, most: int) -> Prompt:
        """The first tokens of a text to embed, with its end token if the tokenizer gives it one."""
        if len(prompt.tokens) <= most:
            return prompt
        end = [token for token in prompt.tokens[-1:] if token in self.tokenizer.all_special_ids]
        return Prompt(prompt.tokens[: most - len(end)] + end)

    def constraint(self, request: Request, prompt: Prompt) -> Constraint | None:
        """What holds the answer to the format or the calls that the request demands; None if it
        demands neither, or calls that cannot be enforced. Raises InvalidRequest for a format that
        cannot be."""
        if request.format is not None and not prompt.opening:
            return self._formatted(request, prompt)
        if prompt.opening or request.strict:
            try:
                return self._calls(request, prompt.opening)
            except (InvalidRequest, RecursionError) as error:
                log.warning("calls are not held to their schemas: %s", error)
        return None

    def _calls(self, request: Request, opening: str) -> Constraint | None:
        """Holds the call that is opened already or, without `opening`, each one from its tag on."""
        tools = [
            tool
            for tool in [*request.tools, *request.deferred_tools]
            if request.tool_choice in ("any", "auto", tool["function"]["name"])
        ]
        grammar = self.format.grammar(
            tools, request.parallel_tool_calls and bool(opening), self._literal
        )
        if not grammar or not tools:
            return None
        matcher, begun = self._matcher(grammar), self._encode_whole(opening or self.format.call[0])
        if not matcher.consume_tokens(begun):
            raise InvalidRequest(grammar_error(matcher))
        for warning in matcher.get_grammar_warnings():
            log.warning("the call's arguments are not held to all of their schema: %s", warning)
        return Constraint(matcher, trigger=[] if opening else begun)

    def _formatted(self, request: Request, prompt: Prompt) -> Constraint:
        schema = {"type": "object"} if request.format == "json" else request.format
        start, end = self.format.thinking or ("", "")
        begun = request.messages[-1] if request.prompt is None else {"role": "user"}
        thought = begun["role"] == "assistant" or self.tokenizer.decode(
            prompt.tokens[-8:]
        ).rstrip().endswith(end)
        exits = {}
        if request.thinking is not False and not prompt.in_thinking and not thought:
            exits[self._encode_whole(start)[0]] = True
        # What models put behind their thinking
        blanks = ["\n", "\n\n"] if exits or prompt.in_thinking else []
        lead = f"({' | '.join(map(json.dumps, blanks))})?" if blanks else ""
        matcher = self._matcher(f"start: {lead} value\nvalue: {json_rule(schema)}")
        reason = (
            grammar_error(matcher)
            if matcher.is_error()
            else ""
            if has_finite_value(schema)
            else "no text matches it"
        )
        if reason:
            raise InvalidRequest(f"the output format cannot be enforced: {reason}")
        for warning in matcher.get_grammar_warnings():
            # Which JSON Schema itself takes for no more than a note
            if not warning.startswith("Unknown format"):
                raise InvalidRequest(
                    f"the output format cannot be enforced: {warning.partition(', falling back')[0]}"
                )
        if begun["role"] == "assistant" and not matcher.consume_tokens(
            self._grammar_tokenizer.tokenize_str(begun["content"])
        ):
            raise InvalidRequest(
                "the assistant message to be continued does not fit the output format"
            )
        if self.format.call and request.tools and request.tool_choice != "none":
            exits[self._encode_whole(self.format.call[0])[0]] = False
        return Constraint(
            matcher,
            None if prompt.in_thinking else 0,
            exits,
            self._encode_whole(end),
            [token for text in blanks for token in self._encode_whole(text)],
        )

    def budget(self, request: Request, prompt: Prompt, begins: int) -> ThinkingBudget | None:
        """What ends the thinking when the request's budget is spent; None if it has none or nothing
        that could be ended. The answer begins behind `begins` tokens."""
        if (
            request.thinking_budget is None
            or request.prompt is not None
            or prompt.opening
            or not self.format.thinking
        ):
            return None
        start, end = map(self._encode_whole, self.format.thinking)
        call = self._encode_whole(self.format.call[0]) if self.format.call else end
        return ThinkingBudget(
            request.thinking_budget, begins, [] if prompt.in_thinking else start, end, call
        )

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer

            return LLTokenizer(
                self.tokenizer.backend_tokenizer.to_str(),
                eos_token=sorted(self.tokenizer.eos_token_ids),
            )
        except ImportError:
            raise InvalidRequest(
                'structured output needs one more package: pip install "mlx-server[constrained]"'
            ) from None
        except (AttributeError, ValueError) as error:
            raise InvalidRequest(
                f"this model's tokenizer does not allow structured output: {first_line(error)}"
            ) from error

    def _matcher(self, grammar: str) -> Any:
        tokenizer = self._grammar_tokenizer
        from llguidance import LLMatcher

        # Forced text would be tokenised as a whole, and what it spells might become a special
        # token.
        return LLMatcher(
            tokenizer,
            LLMatcher.grammar_from_lark('%llguidance {"no_forcing": true}\n' + grammar),
            log_level=0,
        )

    def _literal(self, text: str) -> str:
        """A text in a grammar, where special tokens are told from text that only looks like
        them."""
        special = self._grammar_tokenizer.is_special_token
        names = {
            token.content: f"<[{id}]>"
            for id, token in self.tokenizer.added_tokens_decoder.items()
            if special(id)
        }
        pieces = re.split(
            f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})", text
        )
        return (
            " ".join(
                names.get(piece) or json.dumps(piece, ensure_ascii=False)
                for piece in pieces
                if piece
            )
            or '""'
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, from the table that mlx-lm's detokenizer has for most models."""
        table = getattr(self.tokenizer.detokenizer, "tokenmap", None)
        if table is None:
            return self.tokenizer.decode([token]).encode()
        # Some models have more logits than tokens
        written = table[token] if token < len(table) else ""
        if isinstance(written, bytes):  # SentencePiece
            return written.replace("\u2581".encode(), b" ")
        return b"".join(_byte_letters().get(letter) or letter.encode() for letter in written)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises InvalidRequest for ids that no token has."""
        for token in tokens:
            if not 0 <= token < len(self.tokenizer):
                raise InvalidRequest(f"the model has no token {token}")

    def locate(self, request: Request, before: str) -> tuple[int, str] | None:
        """The index and the role of the message in which the prompt's text goes beyond `before`;
        None where the template does not tell."""
        messages, options = request.messages, self._options(request)
        tools = request.tools if request.tool_choice != "none" else []

        def ends_within(index: int) -> bool:
            return len(
                self.template.render(messages[: index + 1], tools, options, generation=False)
            ) <= len(before)

        if self.template is None or not messages or request.context:
            return None
        try:
            at = bisect.bisect_left(
                range(len(messages) - 1), True, key=lambda index: not ends_within(index)
            )
        except InvalidRequest:  # a conversation that ends there is none
            return None
        return at, messages[at]["role"]

    def remember(self, job: Any) -> str:
        """Keeps the answer of a request that has decoded, under the ids of its calls or else the
        text the client saw; returns that key."""
        opening = job._prompt.opening
        tokens = job._line.tokens[job.prompt_tokens - len(self._encode_whole(opening)) :]
        if tokens and tokens[-1] in self.tokenizer.eos_token_ids:
            tokens = tokens[:-1]
        visible = (
            job._raw.rpartition(self.format.thinking[1])[2] if job._thinking else opening + job._raw
        )
        key = _answer_key(job._parser.call_ids, job._visible, job.request.messages)
        while mark := self._structural_markers.match(visible):
            visible = visible[mark.end() :]
        self.learn({key: Answer(tokens, visible.lstrip("\n"), job._thinking)})
        return key

    def learn(self, answers: dict[str, Answer]) -> None:
        """Remembers answers, and forgets the oldest for them."""
        for key, answer in answers.items():
            _keep(self._answers, key, answer, self.REMEMBERED)

    def answer(self, key: str) -> Answer | None:
        """A remembered answer."""
        return self._answers.get(key)

    def _recall(
        self, messages: list[Message], lost: Iterable[str] = ()
    ) -> tuple[list[Message], dict[str, Answer]]:
        """The conversation with a mark for the text of every remembered answer, and the answers by
        their marks, apart from `lost` ones. Their thinking is put back where the client left it
        out: whether it is shown is the template's decision."""
        marked, answers = list(messages), {}
        for at, message in enumerate(messages[:-1]):
            if message["role"] == "assistant":
                ids = [call.get("id", "") for call in message.get("tool_calls") or []]
                answer = self._answers.get(_answer_key(ids, message["content"], messages[:at]))
                mark = f"{MARK}{at}{MARK}"
                if answer is not None and mark not in lost:
                    answers[mark] = answer
                    marked[at] = {**message, "content": mark}
                    if answer.thinking and not message.get("reasoning_content"):
                        marked[at]["reasoning_content"] = answer.thinking
        return marked, answers

    def _splice(self, text: str, answers: dict[str, Answer], opener: str) -> list[int]:
        """Tokenises a text in which marks stand for answers: from a mark to the end of its turn the
        model's own tokens replace what the template made of them, and so does its thinking, unless
        the template has dropped that."""
        header = opener.partition((self.format.thinking or ("\0",))[0])[0]
        tokens: list[int] = []
        for mark, answer in answers.items():
            before, _, text = text.partition(mark)
            end = self._turn_end.search(text)
            text = text[end.start() :] if end else ""
            turn = before.rfind(header) + len(header) if header else -1
            shown = self._structural_markers.sub("", before[turn:]).strip()
            # The answer has its own markup around text
            if turn >= 0 and (shown if answer.thinking else self.format.structural_markers):
                before = before[:turn] + (
                    opener[len(header) :]
                    if opener.rstrip().endswith(self.format.thinking[0])
                    else ""
                )
                tokens += self.encode(before) + answer.tokens
            elif answer.thinking:
                tokens += self.encode(before + answer.visible)
            else:
                tokens += self.encode(before) + answer.tokens
        return tokens + self.encode(text)

    def _clock(self, messages: list[Message]) -> Callable[[str], str]:
        """What a template asks for the date: it stays that of the conversation's beginning, since a
        new date at the head of the prompt would have all of it prefilled again at midnight."""
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
        key = hashlib.sha256(json.dumps(messages[: first + 1]).encode()).hexdigest()
        born = self._births.get(key) or _keep(
            self._births, key, datetime.datetime.now(), self.REMEMBERED
        )
        return born.strftime

    def _options(self, request: Request) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.template.shows_dates:
            options["strftime_now"] = self._clock(request.messages)
        thinking = False if request.tool_choice not in ("auto", "none") else request.thinking
        if thinking is not None:
            options["enable_thinking"] = thinking
        if request.effort and thinking is not False and self.template.mentions("reasoning_effort"):
            known = self.template.mentions(f"'{request.effort}'") or self.template.mentions(
                f'"{request.effort}"'
            )
            options["reasoning_effort"] = (
                request.effort if known else _EFFORTS.get(request.effort, request.effort)
            )
        return options

    def _opener(self, messages: list[Message], tools: list[dict], options: dict, text: str) -> str:
        """What the template puts behind the conversation to open the assistant's turn. It depends
        on little, and rendering a long conversation twice to see it takes long."""
        key = (
            json.dumps([{**options, "strftime_now": 0}, bool(tools), messages[-1]["role"]])
            if messages
            else ""
        )
        opener = self._openers.get(key)
        if opener is None or not text.endswith(opener):
            body = self.template.render(messages, tools, options, generation=False)
            opener = text[len(body) :] if text.startswith(body) else ""
            if opener:
                _keep(self._openers, key, opener, self.REMEMBERED)
        return opener

    def _turn(self, messages: list[Message], text: str, length: int) -> int:
        """Token count before what the user says last; 0 unless it is the last message."""
        if self._specials is None or not messages or messages[-1]["role"] != "user":
            return 0
        at = text.rfind(messages[-1]["content"].strip())
        cuts = [
            match.end() for match in self._specials.finditer(text, max(0, at - 200), max(0, at))
        ]
        return (
            max(0, length - len(self.encode(text[cuts[-1] :])))
            if cuts and MARK not in text[cuts[-1] :]
            else 0
        )

    def _root(
        self, messages: list[Message], tools: list[dict], options: dict, text: str, length: int
    ) -> int:
        """Token count of system and tools: what every conversation of this client begins with."""
        head = [m for m in messages[:1] if m["role"] == "system"]
        if not head and not tools:
            return 0
        key = json.dumps([head, tools, options], ensure_ascii=False, default=repr)
        root = self._roots.get(key)
        if root is None:
            try:
                one, two = (
                    self.template.render(
                        [*head, {"role": "user", "content": c}], tools, options, generation=False
                    )
                    for c in "xy"
                )
            except InvalidRequest:
                return 0
            shared = os.path.commonprefix([one, two])
            root = _keep(
                self._roots, key, len(self.encode(shared)) if text.startswith(shared) else 0, 32
            )
        return root if root < length else 0


# For templates that do not name the finer ones
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}


@functools.cache
def _byte_letters() -> dict[str, bytes]:
    """The letters by which byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}


def _answer_key(call_ids: list[str], text: str, before: list[Message]) -> str:
    """What tells an answer from all others: the ids of its calls, else its text and what it
    answers."""
    asked = before[-1]["content"] if before else ""
    return (
        " ".join(call_ids)
        if call_ids
        else hashlib.sha256(f"{asked}\0{text.strip()}".encode()).hexdigest()
    )


def _any_of(texts: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _keep(memory: dict, key: str, value: Any, most: int) -> Any:
    """Puts a value into a memory that forgets the oldest of too many; returns it."""
    memory.pop(key, None)
    while len(memory) >= most:
        memory.pop(next(iter(memory)), None)  # another thread may be faster
    memory[key] = value
    return value
