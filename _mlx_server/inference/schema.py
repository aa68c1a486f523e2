"""JSON schemas as far as tool calls and grammars need them."""

from __future__ import annotations

import collections
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

EMPTY_SCHEMA = {"type": "object", "properties": {}}
TYPES_OF = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}
EVERY_TYPE = set().union(*TYPES_OF.values()) - {"integer"}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
# What a keyword must be to count at all.
_FORMS = {
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


def alternatives(schema: Any, root: Any, path: tuple[str, ...] = ()) -> list[dict]:
    """The alternatives of a schema, at most 64, without references into `root` and combinations on
    their highest level; none if it refers to nothing but itself."""
    if not isinstance(schema, dict) or len(path) > 64:
        return [] if schema is False else [{}]
    schema = {
        key: value for key, value in schema.items() if isinstance(value, _FORMS.get(key, object))
    }
    parts = [
        {
            key: value
            for key, value in schema.items()
            if key not in ("$ref", "allOf", "anyOf", "oneOf")
        }
    ]
    groups = [[one] for one in schema.get("allOf", ())] + [
        schema[key] for key in ("anyOf", "oneOf") if schema.get(key)
    ]
    if reference := schema.get("$ref", ""):
        if reference in path:
            return []
        groups.append([_pointed(root, reference)])
    for group in groups:
        choices = (
            one for choice in group for one in alternatives(choice, root, (*path, reference))
        )
        pairs = itertools.product(parts, itertools.islice(choices, 64))
        parts = [_merged(one, other) for one, other in itertools.islice(pairs, 64)]
    return parts


def _pointed(root: Any, reference: str) -> Any:
    """What a reference within a schema points to (RFC 6901); {} when that is nowhere."""
    for step in reference.lstrip("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step, {}) if isinstance(root, dict) else {}
    return root


def _merged(one: dict, other: dict) -> dict:
    return {
        **one,
        **other,
        "properties": {**one.get("properties", {}), **other.get("properties", {})},
        "required": [*one.get("required", ()), *other.get("required", ())],
    }


def listed_values(part: dict) -> list | None:
    """The only values that a schema allows, if it lists them."""
    return [part["const"]] if "const" in part else part.get("enum")


def allowed_types(part: dict) -> set[str]:
    """The JSON types that a schema without combinations allows; empty when it does not say."""
    named = part.get("type", [])
    kinds = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    listed = listed_values(part)
    if listed is None:
        return kinds
    possible = {kind for value in listed for kind in TYPES_OF[type(value)]}
    return kinds & possible or possible


def _property_types(schema: Any, root: Any) -> set[str]:
    """The JSON types that a property's schema allows; empty when it does not say."""
    parts = alternatives(schema, root)
    if len(parts) == 1:
        return allowed_types(parts[0])
    # An untyped alternative may well be a string
    return {kind for part in parts for kind in allowed_types(part) or {"string"}}


def can_end(schema: Any) -> bool:
    """Whether a value that matches can come to an end: no part of it needs another of its own kind,
    without end."""
    needs: dict[int, list[list[Any]]] = {}  # schema -> what each of its alternatives holds at least
    waiting, root = [schema], schema
    while waiting:
        one = waiting.pop()
        if id(one) in needs:
            continue
        needs[id(one)] = parts = []
        for part in alternatives(one, root):
            kinds, needed = allowed_types(part) if listed_values(part) is None else set(), []
            if kinds == {"object"}:
                properties = part.get("properties", {})
                needed = [properties[key] for key in properties if key in part.get("required", ())]
            elif kinds == {"array"}:
                first, least = part.get("prefixItems", []), part.get("minItems", 0)
                needed = first[:least] + [part.get("items", {})] * (least > len(first))
            parts.append(needed)
            waiting += needed
    ended: set[int] = set()
    while new := {
        one
        for one, parts in needs.items()
        if one not in ended and any(all(id(need) in ended for need in needed) for needed in parts)
    }:
        ended |= new
    return id(schema) in ended


def coerce(value: Any, types: set[str]) -> Any:
    """`value`, or what it spells when it is text and may be of one of `types`, but no string."""
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
    return spelled if TYPES_OF[type(spelled)] & types else value


def declared_types(tools: Iterable[dict]) -> dict[str, collections.defaultdict[str, set[str]]]:
    """Tool name -> property name -> the types it allows. What is not shaped like a schema counts as
    not said."""
    declared = {}
    for tool in tools:
        schema = tool["function"].get("parameters")
        parts = alternatives(schema, schema)
        others = set().union(
            *(_property_types(part.get("additionalProperties"), schema) for part in parts)
        )
        types = declared[tool["function"]["name"]] = collections.defaultdict(
            lambda others=others: others
        )
        for key, value in (
            (key, value) for part in parts for key, value in part.get("properties", {}).items()
        ):
            types[key] = types.get(key, set()) | _property_types(value, schema)
    return declared
