"""JSON schemas, as far as tool calls and grammars need them.

Tools come from clients, so a schema may be anything: a keyword whose value has the wrong type
counts as absent, and no function here fails on a strange one. What takes more than
`MAX_WORK` steps is given up: definitions that name each other twice double them at every level.
https://json-schema.org/draft/2020-12/json-schema-core
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

log = logging.getLogger("mlx_server")

EMPTY_SCHEMA: dict[str, Any] = {"type": "object", "properties": {}}

# A value's Python type -> the names that JSON Schema has for it.
JSON_TYPES: dict[type, set[str]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}
# The types that make up all values. "integer" is a part of "number".
PRIMITIVE_TYPES = frozenset(("array", "boolean", "null", "number", "object", "string"))
MAX_ALTERNATIVES = 64
MAX_DEPTH = 64  # of references and combinations within each other
# Keywords that are read or copied for one schema, or for all tools of a request: some 0.2 s.
MAX_WORK = 100_000

_PYTHON_WORDS = {"True": True, "False": False, "None": None}
# The type that a keyword's value must have to count.
_KEYWORD_TYPES: dict[str, type | tuple[type, ...]] = {
    "$ref": str,
    "allOf": list,
    "anyOf": list,
    "oneOf": list,
    "enum": list,
    "type": (str, list),
    "properties": dict,
    "required": list,
    "prefixItems": list,
    "minItems": int,
    "maxItems": int,
    "minLength": int,
    "maxLength": int,
    "pattern": str,
}
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")


class TooComplex(ValueError):
    """A schema takes more work than is spent on one."""


class Work:
    """The steps that are left for a schema."""

    def __init__(self, steps: int = MAX_WORK):
        self._steps = steps

    def spend(self, steps: int) -> None:
        """Raises TooComplex when no steps are left."""
        self._steps -= steps
        if self._steps < 0:
            raise TooComplex("its parts refer to each other too often")


def expand(schema: Any, root: Any, work: Work, path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The alternatives of a schema, at most MAX_ALTERNATIVES, each free of `$ref`, `allOf`,
    `anyOf` and `oneOf` at its top level.

    References are looked up in `root`; `path` holds those that lead here. A schema that refers to
    nothing but itself has no alternatives. Raises TooComplex when `work` is used up.
    """
    work.spend(8)
    if not isinstance(schema, dict) or len(path) > MAX_DEPTH:
        return [] if schema is False else [{}]
    work.spend(_size(schema))
    schema = {
        key: value
        for key, value in schema.items()
        if isinstance(value, _KEYWORD_TYPES.get(key, object))
    }
    alternatives = [{key: value for key, value in schema.items() if key not in _COMBINING}]
    # Of each group one schema must match, too.
    groups = [[one] for one in schema.get("allOf", ())]
    groups += [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    if reference := schema.get("$ref", ""):
        if reference in path:
            return []
        groups.append([resolve(reference, root)])
    for group in groups:
        choices = (
            choice for member in group for choice in expand(member, root, work, (*path, reference))
        )
        pairs = itertools.product(alternatives, itertools.islice(choices, MAX_ALTERNATIVES))
        alternatives = [
            _merge(one, other, work) for one, other in itertools.islice(pairs, MAX_ALTERNATIVES)
        ]
    return alternatives


def _size(schema: dict[str, Any]) -> int:
    """The steps that it takes to read a schema's own keywords, without the schemas within it."""
    values = schema.values()
    lists = sum(len(value) for value in values if isinstance(value, (list, dict)))
    texts = sum(len(value) for value in values if isinstance(value, str))
    return len(schema) + lists + texts // 16


def resolve(reference: str, root: Any) -> Any:
    """What a reference within a schema points to (RFC 6901); {} when that is nowhere."""
    for step in reference.lstrip("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step, {}) if isinstance(root, dict) else {}
    return root


def _merge(one: dict[str, Any], other: dict[str, Any], work: Work) -> dict[str, Any]:
    """A schema that demands what two schemas demand."""
    properties = {**one.get("properties", {}), **other.get("properties", {})}
    required = [*one.get("required", ()), *other.get("required", ())]
    work.spend(len(one) + len(other) + len(properties) + len(required))
    return {**one, **other, "properties": properties, "required": required}


def enum_values(schema: dict[str, Any]) -> list[Any] | None:
    """The only values that `const` or `enum` allow; None without these keywords."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def allowed_types(schema: dict[str, Any]) -> set[str]:
    """The JSON types that an expanded schema allows; empty when it does not say."""
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    values = enum_values(schema)
    if values is None:
        return types
    of_values = {name for value in values for name in JSON_TYPES[type(value)]}
    return types & of_values or of_values


def _expanded_types(schema: Any, root: Any, work: Work) -> set[str]:
    """The JSON types that a schema allows; empty when it does not say."""
    alternatives = expand(schema, root, work)
    if len(alternatives) == 1:
        return allowed_types(alternatives[0])
    # An alternative without a type may well be a string.
    return {name for one in alternatives for name in allowed_types(one) or {"string"}}


def has_finite_value(schema: Any) -> bool:
    """Whether a value that matches can come to an end. False when each alternative requires
    another value of the same schema, without end. Raises TooComplex."""
    required: dict[int, list[list[Any]]] = {}  # id of a schema -> per alternative what it requires
    pending, work = [schema], Work()
    while pending:
        one = pending.pop()
        if id(one) not in required:
            parts = [_required_parts(part) for part in expand(one, schema, work)]
            required[id(one)] = parts
            pending += itertools.chain(*parts)
    finite: set[int] = set()
    known = -1
    while len(finite) > known:
        known = len(finite)
        work.spend(len(required))
        # What is required was found behind what requires it.
        for key in reversed(required):
            if any(all(id(part) in finite for part in parts) for parts in required[key]):
                finite.add(key)
    return id(schema) in finite


def _required_parts(schema: dict[str, Any]) -> list[Any]:
    """The schemas of the values that every value of an expanded schema holds."""
    types = allowed_types(schema) if enum_values(schema) is None else set()
    if types == {"object"}:
        required = {key for key in schema.get("required", ()) if isinstance(key, str)}
        properties = schema.get("properties", {})
        return [properties[key] for key in properties if key in required]
    if types == {"array"}:
        first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        return [*first[:least], *[schema.get("items", {})] * (least > len(first))]
    return []


def coerce(value: Any, types: set[str]) -> Any:
    """`value`, or the JSON value that it spells: only when it is a string, and none of `types` is
    "string", and the spelled value has one of them. Python's True, False and None count, too."""
    if not isinstance(value, str) or not types or "string" in types:
        return value
    try:
        spelled = (
            _PYTHON_WORDS[value] if value in _PYTHON_WORDS else json.loads(value, strict=False)
        )
    except (ValueError, RecursionError):
        return value
    if isinstance(spelled, float):
        if not math.isfinite(spelled):
            return value
        if "number" not in types and spelled.is_integer():
            spelled = int(spelled)
    return spelled if JSON_TYPES[type(spelled)] & types else value


ParameterTypes = collections.defaultdict[str, set[str]]


class ToolTypes(Mapping[str, ParameterTypes]):
    """The JSON types that the parameters of tools allow, by the names of both; empty when a tool's
    schema does not say, or says it in too complex a way. `tools` are in OpenAI form. A schema is
    read when somebody asks for its tool: that may be the MLX thread, which nobody must hold up."""

    MOST_WORK = MAX_WORK // 5

    def __init__(self, tools: Iterable[dict[str, Any]]):
        self._schemas = {
            one["function"]["name"]: one["function"].get("parameters") for one in tools
        }
        self._known: dict[str, ParameterTypes] = {}
        self._work = Work(self.MOST_WORK)
        self._given_up = False

    def __getitem__(self, name: str) -> ParameterTypes:
        if name not in self._known:
            self._known[name] = self._types(name)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._schemas

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemas)

    def __len__(self) -> int:
        return len(self._schemas)

    def _types(self, name: str) -> ParameterTypes:
        try:
            return _types_of_parameters(self._schemas[name], self._work)
        except TooComplex as error:
            if not self._given_up:  # once, not for each of thousands of tools
                log.warning("the types of parameters are not known: %s: %s", name[:100], error)
            self._given_up = True
            return collections.defaultdict(set)


def _types_of_parameters(schema: Any, work: Work) -> ParameterTypes:
    alternatives = expand(schema, schema, work)
    others: set[str] = set()
    for one in alternatives:
        others |= _expanded_types(one.get("additionalProperties"), schema, work)
    types: ParameterTypes = collections.defaultdict(functools.partial(set, others))
    for one in alternatives:
        for key, value in one.get("properties", {}).items():
            types[key] = types.get(key, set()) | _expanded_types(value, schema, work)
    return types
