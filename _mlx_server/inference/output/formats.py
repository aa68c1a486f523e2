"""How one model writes its thinking and its tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _mlx_server.inference.constrained.grammar import calls_grammar
from _mlx_server.inference.output.call_syntax import CallSyntax
from _mlx_server.inference.output.json_calls import JSON_CALL, ParseCalls


@dataclass
class OutputFormat:
    """How one model writes its thinking and its tool calls; built once per model.

    `thinking` and `call` are pairs of tags: what begins and what ends a stretch. An empty end tag
    means that calls last as long as their text makes sense. Between its tags a call has one of
    `syntaxes`, the one in which calls are demanded first, or else it is a text that `parse` turns
    into names and arguments; `parse` raises ValueError for any other text.
    """

    thinking: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    parse: ParseCalls | None = None
    syntaxes: tuple[CallSyntax, ...] = ()
    # Texts that begin a call without a call tag, at the beginning of a line.
    line_starts: tuple[str, ...] = ()
    # Whether the model often leaves out the call tags.
    untagged: bool = False
    # Markup around visible text.
    structural_markers: tuple[str, ...] = ()
    # Tags after which nothing follows.
    turn_ends: tuple[str, ...] = ()

    @property
    def bare_syntaxes(self) -> tuple[CallSyntax, ...]:
        """The syntaxes of an answer that is a call without call tags."""
        return self.syntaxes if self.untagged else (JSON_CALL,)

    def call_prefix(self, tool_choice: str) -> str:
        """The text with which an answer begins when a call is demanded. `tool_choice` is "any" or a
        tool's name; "" for "auto" and "none", or when this format has no call tag."""
        if tool_choice in ("auto", "none") or self.call is None:
            return ""
        if tool_choice == "any" or not self.syntaxes:
            return self.call[0]
        return self.call[0] + self.syntaxes[0].head_for(tool_choice)

    def grammar(
        self, tools: Sequence[dict[str, Any]], parallel: bool, literal: Callable[[str], str]
    ) -> str:
        """The grammar of an answer that is one call to one of `tools`, or several calls if
        `parallel`; "" when it is not known how this format writes its calls. For `literal` and
        errors see `calls_grammar`."""
        if self.call is None or not self.syntaxes:
            return ""
        return calls_grammar(self.syntaxes[0], self.call, tools, parallel, literal)
