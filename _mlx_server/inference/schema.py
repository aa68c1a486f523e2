"""JSON schemas, as far as tool calls and grammars need them.

Tools come from clients, so a schema may be anything: a keyword whose value has the wrong type
counts as absent, and no function here fails on a strange one.
https://json-schema.org/draft/2020-12/json-schema-core
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

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


def expand(schema: Any, root: Any, path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The alternatives of a schema, at most MAX_ALTERNATIVES, each free of `$ref`, `allOf`,
    `anyOf` and `oneOf` at its top level.

    References are looked up in `root`; `path` holds those that lead here. A schema that refers to
    nothing but itself has no alternatives.
    """
    if not isinstance(schema, dict) or len(path) > MAX_DEPTH:
        return [] if schema is False else [{}]
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
        groups.append([_resolve(reference, root)])
    for group in groups:
        choices = (
            choice for member in group for choice in expand(member, root, (*path, reference))
        )
        pairs = itertools.product(alternatives, itertools.islice(choices, MAX_ALTERNATIVES))
        alternatives = [
            _merge(one, other) for one, other in itertools.islice(pairs, MAX_ALTERNATIVES)
        ]
    return alternatives


def _resolve(reference: str, root: Any) -> Any:
    """What a reference within a schema points to (RFC 6901); {} when that is nowhere."""
    for step in reference.lstrip("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step, {}) if isinstance(root, dict) else {}
    return root


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A schema that demands what two schemas demand."""
    return {
        **one,
        **other,
        "properties": {**one.get("properties", {}), **other.get("properties", {})},
        "required": [*one.get("required", ()), *other.get("required", ())],
    }


def enum_values(schema: dict[str, Any]) -> list | None:
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


def _expanded_types(schema: Any, root: Any) -> set[str]:
    """The JSON types that a schema allows; empty when it does not say."""
    alternatives = expand(schema, root)
    if len(alternatives) == 1:
        return allowed_types(alternatives[0])
    # An alternative without a type may well be a string.
    return {name for one in alternatives for name in allowed_types(one) or {"string"}}


def has_finite_value(schema: Any) -> bool:
    """Whether a value that matches can come to an end. False when each alternative requires
    another value of the same schema, without end."""
    required: dict[int, list[list[Any]]] = {}  # id of a schema -> per alternative what it requires
    pending = [schema]
    while pending:
        one = pending.pop()
        if id(one) not in required:
            required[id(one)] = [_required_parts(part) for part in expand(one, schema)]
            pending += itertools.chain(*required[id(one)])
    finite: set[int] = set()
    while new := {
        one
        for one, alternatives in required.items()
        if one not in finite
        and any(all(id(part) in finite for part in parts) for parts in alternatives)
    }:
        finite |= new
    return id(schema) in finite


def _required_parts(schema: dict[str, Any]) -> list[Any]:
    """The schemas of the values that every value of an expanded schema holds."""
    types = allowed_types(schema) if enum_values(schema) is None else set()
    if types == {"object"}:
        properties, required = schema.get("properties", {}), schema.get("required", ())
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


def parameter_types(tools: Iterable[dict[str, Any]]) -> dict[str, ParameterTypes]:
    """Tool name -> parameter name -> the JSON types it allows, empty when the tool's schema does
    not say. `tools` are in OpenAI form."""
    declared = {}
    for tool in tools:
        schema = tool["function"].get("parameters")
        alternatives = expand(schema, schema)
        others: set[str] = set()
        for one in alternatives:
            others |= _expanded_types(one.get("additionalProperties"), schema)
        types: ParameterTypes = collections.defaultdict(functools.partial(set, others))
        for one in alternatives:
            for key, value in one.get("properties", {}).items():
                types[key] = types.get(key, set()) | _expanded_types(value, schema)
        declared[tool["function"]["name"]] = types
    return declared
