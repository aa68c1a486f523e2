"""What holds a request's answer to a format, to the tools' schemas or to a thinking budget."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.constrained.constraint import Constraint, ThinkingBudget, grammar_error
from _mlx_server.inference.constrained.grammar import json_rule, pattern_grammar, without_patterns
from _mlx_server.inference.constrained.grammar_compiler import GrammarCompiler
from _mlx_server.inference.constrained.schema import TooComplex, has_finite_value
from _mlx_server.inference.constrained.schema_limits import check_enforceable
from _mlx_server.inference.output.formats import OutputFormat
from _mlx_server.inference.prompt.prompt import Prompt
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import EFFORT_BUDGETS, InvalidRequest, Request

log = logging.getLogger("mlx_server")


class OutputRules:
    """Makes the logits processors that a request needs, for one model. `efforts` is whether its
    template makes something of a request's effort."""

    MAX_TESTED = 32  # patterns of a request's tools

    def __init__(self, tokenizer: TextTokenizer, format: OutputFormat, efforts: bool):
        self._tokenizer, self._format, self._efforts = tokenizer, format, efforts
        self._grammars = GrammarCompiler(tokenizer)

    def constraint(self, request: Request, prompt: Prompt) -> Constraint | None:
        """What holds the answer to the format or the calls that the request demands; None if it
        demands neither, or calls that cannot be enforced. Raises InvalidRequest for a format that
        cannot be enforced."""
        if request.format is not None and not prompt.opening:
            schema = request.format if isinstance(request.format, dict) else {"type": "object"}
            return self._format_constraint(request, prompt, schema)
        if prompt.opening or request.strict:
            try:
                return self._call_constraint(request, prompt.opening)
            except (InvalidRequest, TooComplex, RecursionError) as error:
                log.warning("calls are not held to their schemas: %s", error)
        return None

    def budget(self, request: Request, prompt: Prompt, begins: int) -> ThinkingBudget | None:
        """What ends the thinking when the budget of the request, or of its effort, is spent; None
        if it has none, or the answer no thinking. The answer begins behind `begins` tokens."""
        thinking, budget = self._format.thinking, request.thinking_budget
        if budget is None and not self._efforts:
            budget = EFFORT_BUDGETS.get(request.effort or "")
        if budget is None or not thinking:
            return None
        if request.prompt is not None or prompt.opening:
            return None
        start, end = map(self._tokenizer.encode, thinking)
        call = self._tokenizer.encode(self._format.call[0]) if self._format.call else end
        start = [] if prompt.in_thinking else start
        return ThinkingBudget(budget, begins, start, end, call)

    def _call_constraint(self, request: Request, opening: str) -> Constraint | None:
        """Holds the call that the prompt has opened or, without `opening`, each call from its tag
        on."""
        format, choice = self._format, request.tool_choice
        tools = [
            tool
            for tool in [*request.tools, *request.deferred_tools]
            if choice in ("any", "auto", tool["function"]["name"])
        ]
        parallel = request.parallel_tool_calls and bool(opening)
        grammar = format.grammar(tools, parallel, self._grammars.literal)
        if not grammar or not tools or not format.call:
            return None
        matcher = self._grammars.matcher(grammar)
        if matcher.is_error():
            log.warning("patterns of tools may not be held: %s", grammar_error(matcher))
            tools = without_patterns(tools, functools.cache(self._pattern_check()))
            grammar = format.grammar(tools, parallel, self._grammars.literal)
            matcher = self._grammars.matcher(grammar)
        begun = self._tokenizer.encode(opening or format.call[0])
        if not matcher.consume_tokens(begun):
            raise InvalidRequest(grammar_error(matcher))
        for warning in matcher.get_grammar_warnings():
            log.warning("the call's arguments are not held to all of their schema: %s", warning)
        return Constraint(matcher, trigger=[] if opening else begun)

    def _pattern_check(self) -> Callable[[str], bool]:
        """Tells of each pattern whether it cannot be held; of those after MAX_TESTED it says so
        untested."""
        left = iter(range(self.MAX_TESTED))

        def cannot_be_held(pattern: str) -> bool:
            tested = next(left, None) is not None
            return not tested or bool(self._grammars.matcher(pattern_grammar(pattern)).is_error())

        return cannot_be_held

    def _format_constraint(
        self, request: Request, prompt: Prompt, schema: dict[str, Any]
    ) -> Constraint:
        """Holds the visible answer to JSON of a schema; the model may think first, or call a
        tool."""
        start, end = self._format.thinking or ("", "")
        last = request.messages[-1] if request.prompt is None else None
        continued = last["content"] if last and last["role"] == "assistant" else None
        exits: dict[int, bool] = {}  # the tokens that lead into thinking (True) or a call (False)
        if continued is None and self._may_begin_thinking(request, prompt):
            exits[self._tokenizer.encode(start)[0]] = True
        # Models write these behind their thinking
        blanks = ["\n", "\n\n"] if exits or prompt.in_thinking else []
        matcher = self._json_matcher(schema, blanks)
        if continued is not None and not matcher.consume_tokens(self._grammars.encode(continued)):
            raise InvalidRequest(
                "the assistant message to be continued does not fit the output format"
            )
        if self._format.call and request.tools and request.tool_choice != "none":
            exits[self._tokenizer.encode(self._format.call[0])[0]] = False
        return Constraint(
            matcher,
            None if prompt.in_thinking else 0,
            exits,
            self._tokenizer.encode(end),
            [token for text in blanks for token in self._tokenizer.encode(text)],
        )

    def _may_begin_thinking(self, request: Request, prompt: Prompt) -> bool:
        """Whether the answer may begin with thinking. It may not where the prompt ends inside or
        behind it."""
        if request.thinking is False or prompt.in_thinking or not self._format.thinking:
            return False
        ending = self._tokenizer.decode(prompt.tokens[-8:])
        return not ending.rstrip().endswith(self._format.thinking[1])

    def _json_matcher(self, schema: dict[str, Any], blanks: list[str]) -> Any:
        """A matcher for JSON of a schema, which one of `blanks` may precede. Raises InvalidRequest
        if the schema cannot be enforced in full."""
        lead = f"({' | '.join(map(json.dumps, blanks))})?" if blanks else ""
        try:
            check_enforceable([schema])
            finite = has_finite_value(schema)
        except (InvalidRequest, TooComplex) as error:
            raise InvalidRequest(f"the output format cannot be enforced: {error}") from None
        matcher = self._grammars.matcher(f"start: {lead} value\nvalue: {json_rule(schema)}")
        reason = ""
        if matcher.is_error():
            reason = grammar_error(matcher)
        elif not finite:
            reason = "no text matches it"
        else:
            for warning in matcher.get_grammar_warnings():
                # JSON Schema itself takes an unknown format for no more than a note
                if not warning.startswith("Unknown format"):
                    reason = warning.partition(", falling back")[0]
                    break
        if reason:
            raise InvalidRequest(f"the output format cannot be enforced: {reason}")
        return matcher
