"""Grammars that hold tool arguments and structured output to a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from _mlx_server.inference.call_syntax import CallSyntax
from _mlx_server.inference.schema import (
    EVERY_TYPE,
    TYPES_OF,
    allowed_types,
    alternatives,
    listed_values,
)

# One blank, or a new line with its indentation: a model cannot go on writing nothing but blanks.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,16}", "lenient": True}


def json_rule(schema: dict) -> str:
    """The grammar of JSON text that matches a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


class ArgumentsGrammar:
    """The grammar of a tool's arguments that are no JSON object, as `rules` of which the first has
    the name `prefix`.

    Arguments come in the order of the schema's properties. Between tags, strings are free up to
    their end tag and all else is JSON; where strings have quotes that are not JSON's, objects and
    arrays are written with these. Of what a schema says of strings their lengths, patterns and
    lists are kept. `literal` makes an expression of a text."""

    def __init__(self, shape: CallSyntax, schema: dict, prefix: str, literal: Callable[[str], str]):
        self.call_syntax, self._root, self._prefix, self._literal = shape, schema, prefix, literal
        self._before, self._behind, self._between, _ = shape.written
        self._definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        self._names: dict[str, str] = {}  # a schema in JSON -> the rule of its values
        self.rules = [""]
        self.rules[0] = f"{prefix}: {' | '.join(map(self._members, alternatives(schema, schema)))}"

    def _add(self, expression: str, terminal: bool = False, option: str = "") -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        name = name.upper() if terminal else name
        self.rules.append(f"{name}{option}: {expression}")
        return name

    def _members(self, schema: dict) -> str:
        """An object's members, without its braces."""
        required, others = schema.get("required", []), schema.get("additionalProperties", {})
        properties = {
            **{key: others for key in required if isinstance(key, str)},
            **schema.get("properties", {}),
        }
        if not properties and others is not False and not self.call_syntax.close:
            pair = self._add(f'/[\\w.-]+/ ":" {self._value(others)}')
            return f"({pair} ({self._literal(self._between)} {pair})*)?"
        first = rest = '""'  # what may come behind nothing, and behind another member
        for key, value in reversed(properties.items()):
            member = self._add(self._member(key, value))
            follows, optional = f"{self._literal(self._between)} {member}", key not in required
            first = self._add(f"{member} {rest}" + (f" | {first}" if optional else ""))
            rest = self._add(f"({follows})? {rest}" if optional else f"{follows} {rest}")
        return first

    def _member(self, key: str, schema: Any) -> str:
        before, behind = (
            self._before.replace("KEY", key),
            self._literal(self._behind.replace("KEY", key)),
        )
        if not self.call_syntax.close:
            return f"{self._literal(before)} {self._value(schema)} {behind}"
        texts, others = [], []
        for part in alternatives(schema, self._root):
            for kind in sorted(allowed_types(part)) or ["string"]:
                head = self._literal(
                    before.replace(
                        "KIND", self.call_syntax.kind(kind) if self.call_syntax.kind else ""
                    )
                )
                value = (
                    self._text(part, behind)
                    if kind == "string"
                    else f"{self._json(part, kind)} {behind}"
                )
                (texts if kind == "string" else others).append(f"{head} {value}")
        return " | ".join(texts + others if self.call_syntax.kind else texts or others)

    def _value(self, schema: Any) -> str:
        """The name of the rule of a value that does not stand between tags."""
        if self.call_syntax.quotes[0] == '"':
            return self._add(
                json_rule({**self._definitions, **schema} if isinstance(schema, dict) else {})
            )
        known = json.dumps(schema)
        if known not in self._names:
            self._names[known] = self._add("")  # it may hold itself
            at = len(self.rules) - 1
            self.rules[at] += " | ".join(
                self._quoted(part, kind)
                for part in alternatives(schema, self._root)
                for kind in sorted(allowed_types(part) or EVERY_TYPE)
            )
        return self._names[known]

    def _quoted(self, part: dict, kind: str) -> str:
        """One kind of value in an object like `{k:<|"|>v<|"|>,n:[1]}`."""
        quote, listed = self.call_syntax.quotes[0], listed_values(part)
        if kind in ("string", "array", "object") and listed is not None:
            return " | ".join(
                self._literal(self._spelled(value))
                for value in listed
                if TYPES_OF[type(value)] & {kind}
            )
        if kind == "string":
            return f"{self._literal(quote)} {self._text(part, self._literal(quote))}"
        if kind == "object":
            return f'"{{" ({self._members(part)}) "}}"'
        if kind == "array":
            return f'"[" {self._items(part)} "]"'
        return self._json(part, kind)

    def _items(self, part: dict) -> str:
        """An array's items, without its brackets; those that have places of their own are never
        left out."""
        least, most, others = part.get("minItems", 0), part.get("maxItems"), part.get("items", {})
        placed = [self._value(item) for item in part.get("prefixItems", ())]
        if placed and others is False:
            most = len(placed)
        if most == 0:
            return '""'
        item = "" if most == len(placed) else self._value(others)
        first = placed or [item]
        items = ' "," '.join(first)
        if most != len(first):
            items += f' ("," {item}){{{max(least - len(first), 0)},{"" if most is None else most - len(first)}}}'
        return items if placed or least else f"({items})?"

    def _spelled(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.call_syntax.quotes[0]}{value}{self.call_syntax.quotes[0]}"
        if isinstance(value, dict):
            return (
                "{" + ",".join(f"{key}:{self._spelled(item)}" for key, item in value.items()) + "}"
            )
        return (
            f"[{','.join(map(self._spelled, value))}]"
            if isinstance(value, list)
            else json.dumps(value)
        )

    def _json(self, part: dict, kind: str) -> str:
        return self._add(json_rule({**self._definitions, **part, "type": kind}))

    def _text(self, part: dict, behind: str) -> str:
        """A string and what is written `behind` it, an expression of texts and special tokens."""
        if (listed := listed_values(part)) is not None:
            return f"({' | '.join(self._literal(one) for one in listed if isinstance(one, str))}) {behind}"
        text = [f"/(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})/"]
        if "pattern" in part:
            text.append(_anywhere(part["pattern"]))
        name = self._add(" & ".join(text), terminal=True)
        lead = re.match(r'"(?:[^"\\]|\\.)*"', behind)
        if lead is None:
            return f"{name} {behind}"
        if lead[0] == behind:
            return self._add(name, option=f"[suffix={behind}]")
        # The text may hold what precedes the special token, so that only both together end it.
        return f"{self._add(f'{name} {lead[0]}', terminal=True)} {behind[lead.end() :]}"


def _anywhere(pattern: str) -> str:
    """The expression of a text in which a schema's pattern is found."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = (
        pattern[begins : len(pattern) - ends]
        .replace("/", r"\/")
        .replace("\n", r"\n")
        .replace(r"\d", "[0-9]")
    )
    return f"/{'' if begins else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}/"
