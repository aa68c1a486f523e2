"""Grammars that hold structured output and the calls of tools to their JSON schemas.

They are in llguidance's syntax:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from _mlx_server.inference.constrained.schema import (
    EMPTY_SCHEMA,
    JSON_TYPES,
    MAX_WORK,
    PRIMITIVE_TYPES,
    Work,
    allowed_types,
    enum_values,
    expand,
    has_finite_value,
)
from _mlx_server.inference.constrained.schema_limits import check_enforceable
from _mlx_server.inference.output.call_syntax import CallSyntax, CallTemplate, TagSyntax
from _mlx_server.inference.protocol import InvalidRequest

# One blank, or a newline with its indentation: a model cannot go on writing nothing but blanks.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n {0,16}", "lenient": True}
_EMPTY = '""'  # the expression of no text

Literal = Callable[[str], str]  # makes an expression of a text


def json_rule(schema: dict[str, Any]) -> str:
    """The expression of JSON text that matches a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def calls_grammar(
    syntax: CallSyntax,
    call_tags: tuple[str, str],
    tools: Sequence[dict[str, Any]],
    parallel: bool,
    literal: Literal,
) -> str:
    """The grammar of an answer that is one call to one of `tools`, or several calls if `parallel`;
    "" when `syntax` does not tell how to write calls.

    `tools` are in OpenAI form. `literal` makes an expression of a text, which may hold special
    tokens. Raises InvalidRequest for a tool whose schema no arguments match or takes too much to
    hold.
    """
    template = syntax.template
    if template is None:
        return ""
    calls, rules, work = [], [], Work(4 * MAX_WORK)
    check_enforceable([tool["function"].get("parameters") or EMPTY_SCHEMA for tool in tools])
    for number, tool in enumerate(tools):
        name, arguments = tool["function"]["name"], f"a{number}"
        schema = tool["function"].get("parameters") or EMPTY_SCHEMA
        if not has_finite_value(schema):
            raise InvalidRequest(f"no arguments match the schema of {name}")
        if template.is_json:
            rules.append(f"{arguments}: {json_rule(schema)}")
        else:
            rules += ArgumentsGrammar(syntax, template, schema, arguments, literal, work).rules
        calls.append(f"{literal(syntax.head_for(name))} {arguments} {literal(template.tail)}")
    start, end = map(literal, call_tags)
    newline = literal("\n")
    more = f" ({newline} call)*" if parallel else ""
    return "\n".join(
        [
            f"start: call{more}",
            f"call: {start} ({' | '.join(calls)}) {end}",
            *rules,
        ]
    )


def pattern_grammar(pattern: str) -> str:
    """A grammar that compiles if a schema's `pattern` can be held in every syntax."""
    return f"start: {_containing(pattern)} | json\njson: {json_rule({'pattern': pattern})}"


def without_patterns(schema: Any, dropped: Callable[[str], bool]) -> Any:
    """A schema without those patterns that are to be `dropped`."""
    if isinstance(schema, list):
        return [without_patterns(one, dropped) for one in schema]
    if not isinstance(schema, dict):
        return schema
    pattern = schema.get("pattern")
    drop = isinstance(pattern, str) and dropped(pattern)
    return {
        key: without_patterns(value, dropped)
        for key, value in schema.items()
        if not (drop and key == "pattern")
    }


class ArgumentsGrammar:
    """The grammar of a tool's arguments that are no JSON object, as `rules` of which the first has
    the name `name`.

    Arguments come in the order of the schema's properties. Between tags, strings are free up to
    their end tag and all else is JSON. Where strings have quotes that are not JSON's, objects and
    arrays are written with these quotes, too. Of what a schema says about strings, their lengths,
    patterns and values are kept.

    Methods that end in `_rule` add a rule and return its name; the others return an expression.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        template: CallTemplate,
        schema: dict[str, Any],
        name: str,
        literal: Literal,
        work: Work,
    ):
        self._work = work
        self._tagged = isinstance(syntax, TagSyntax)
        self._quote = '"' if isinstance(syntax, TagSyntax) else syntax.quotes[0]
        self._template, self._root, self._literal = template, schema, literal
        self._separator = literal(template.separator)
        self._definitions: dict[str, Any] = {
            key: schema[key] for key in ("$defs", "definitions") if key in schema
        }
        self._value_rules: dict[str, str] = {}  # a schema in JSON -> its values' rule
        self._name = name
        self.rules = [""]
        self.rules[0] = f"{name}: {' | '.join(map(self._members, expand(schema, schema, work)))}"

    def _add_rule(self, expression: str, terminal: bool = False, option: str = "") -> str:
        self._work.spend(len(expression) // 16)
        name = f"{self._name}_{len(self.rules)}"
        name = name.upper() if terminal else name
        self.rules.append(f"{name}{option}: {expression}")
        return name

    def _members(self, schema: dict[str, Any]) -> str:
        """An object's members, without its braces."""
        required, others = schema.get("required", []), schema.get("additionalProperties", {})
        properties = {
            **{key: others for key in required if isinstance(key, str)},
            **schema.get("properties", {}),
        }
        if not properties and others is not False and not self._tagged:
            pair = self._add_rule(f'/[\\w.-]+/ ":" {self._value_rule(others)}')
            return f"({pair} ({self._separator} {pair})*)?"
        needed = {key for key in required if isinstance(key, str)}
        # From the last member to the first: all from there on, if one came before and if none did
        first = rest = _EMPTY
        for key, value in reversed(properties.items()):
            member = self._add_rule(self._member(key, value))
            following = f"{self._separator} {member}"
            if key in needed:
                first = self._add_rule(f"{member} {rest}")
                rest = self._add_rule(f"{following} {rest}")
            else:
                first = self._add_rule(f"{member} {rest} | {first}")
                rest = self._add_rule(f"({following})? {rest}")
        return first

    def _member(self, key: str, schema: Any) -> str:
        """A property with what stands around its value."""
        before = self._template.before_value.replace("KEY", key)
        after = self._literal(self._template.after_value.replace("KEY", key))
        if not self._tagged:
            return f"{self._literal(before)} {self._value_rule(schema)} {after}"
        kind_of = self._template.kind_of
        strings, others = [], []
        for part in expand(schema, self._root, self._work):
            for name in sorted(allowed_types(part)) or ["string"]:
                opening = self._literal(before.replace("KIND", kind_of(name) if kind_of else ""))
                if name == "string":
                    strings.append(f"{opening} {self._string(part, after)}")
                else:
                    others.append(f"{opening} {self._json_value_rule(part, name)} {after}")
        # Without types in the markup, text that may be a string is one.
        return " | ".join(strings + others if kind_of else strings or others)

    def _value_rule(self, schema: Any) -> str:
        """The rule of a value that does not stand between tags."""
        if self._quote == '"':
            matched = {**self._definitions, **schema} if isinstance(schema, dict) else {}
            return self._add_rule(json_rule(matched))
        known = json.dumps(schema)
        self._work.spend(len(known) // 16)
        if known not in self._value_rules:
            at = len(self.rules)
            # The rule is known before it is complete: the value may hold values of its own schema.
            self._value_rules[known] = self._add_rule("")
            self.rules[at] += " | ".join(
                self._quoted(part, name)
                for part in expand(schema, self._root, self._work)
                for name in sorted(allowed_types(part) or PRIMITIVE_TYPES)
            )
        return self._value_rules[known]

    def _quoted(self, part: dict[str, Any], name: str) -> str:
        """A value of the JSON type `name` in an object like `{k:<|"|>v<|"|>,n:[1]}`."""
        values = enum_values(part)
        if name in ("string", "array", "object") and values is not None:
            written = [self._written(one) for one in values if name in JSON_TYPES[type(one)]]
            return " | ".join(map(self._literal, written))
        if name == "string":
            quote = self._literal(self._quote)
            return f"{quote} {self._string(part, quote)}"
        if name == "object":
            return f'"{{" ({self._members(part)}) "}}"'
        if name == "array":
            return f'"[" {self._items(part)} "]"'
        return self._json_value_rule(part, name)

    def _items(self, part: dict[str, Any]) -> str:
        """An array's items, without its brackets. Those of `prefixItems` are never left out."""
        least, most, others = part.get("minItems", 0), part.get("maxItems"), part.get("items", {})
        placed = [self._value_rule(item) for item in part.get("prefixItems", ())]
        if placed and others is False:
            most = len(placed)
        if most == 0:
            return _EMPTY
        item = "" if most == len(placed) else self._value_rule(others)
        first = placed or [item]
        items = ' "," '.join(first)
        if most != len(first):
            fewest = max(least - len(first), 0)
            items += f' ("," {item}){{{fewest},{"" if most is None else most - len(first)}}}'
        return items if placed or least else f"({items})?"

    def _written(self, value: Any) -> str:
        """The text of a value that stands within quotes of the family's own."""
        if isinstance(value, str):
            return f"{self._quote}{value}{self._quote}"
        if isinstance(value, dict):
            members = (f"{key}:{self._written(item)}" for key, item in value.items())
            return "{" + ",".join(members) + "}"
        if isinstance(value, list):
            return f"[{','.join(map(self._written, value))}]"
        return json.dumps(value)

    def _json_value_rule(self, part: dict[str, Any], name: str) -> str:
        return self._add_rule(json_rule({**self._definitions, **part, "type": name}))

    def _string(self, part: dict[str, Any], after: str) -> str:
        """A string without quotes, and the expression `after` of the texts and special tokens that
        end it."""
        if (values := enum_values(part)) is not None:
            texts = [self._literal(value) for value in values if isinstance(value, str)]
            return f"({' | '.join(texts)}) {after}"
        text = [f"/(?s:.{{{part.get('minLength', 0)},{part.get('maxLength', '')}}})/"]
        if "pattern" in part:
            text.append(_containing(part["pattern"]))
        name = self._add_rule(" & ".join(text), terminal=True)
        first = re.match(r'"(?:[^"\\]|\\.)*"', after)
        if first is None:
            return f"{name} {after}"
        if first[0] == after:
            return self._add_rule(name, option=f"[suffix={after}]")
        # The string may hold what precedes the special token, so that only both together end it.
        ended = self._add_rule(f"{name} {first[0]}", terminal=True)
        return f"{ended} {after[first.end() :]}"


def _containing(pattern: str) -> str:
    """The expression of a text in which a schema's `pattern` is found: it is not anchored, see
    https://json-schema.org/draft/2020-12/json-schema-validation#name-pattern"""
    anchored = pattern.startswith("^")
    ended = re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern) is not None
    inner = pattern[anchored : len(pattern) - ended]
    inner = _SPECIAL.sub(lambda special: _WRITTEN.get(special[0], special[0]), inner)
    before, after = ("" if bound else "(?s:.*)" for bound in (anchored, ended))
    return f"/{before}(?:{inner}){after}/"


# Escapes, and what cannot stand in a grammar's pattern
_SPECIAL = re.compile(r"\\.|/|\n", re.DOTALL)
_WRITTEN = {"/": r"\/", "\n": r"\n", "\\\n": r"\n", r"\d": "[0-9]", r"\D": "[^0-9]"}
