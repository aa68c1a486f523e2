"""What a JSON schema may hold so that its grammar is compiled within about a second.

llguidance cannot be interrupted while it compiles, and some small schemas take it hours or all of
the memory: it decides whether any text matches several patterns together, it writes out each
combination of alternatives that must match together, and it compares the names of optional
properties with each other. So the schema itself is bounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from _mlx_server.inference.constrained.schema import resolve
from _mlx_server.inference.protocol import InvalidRequest

MAX_LENGTH = 256_000  # characters of JSON
MAX_SCHEMAS = 1_000  # in one grammar, which has rules for each
MAX_NESTING = 128  # of schemas within each other; llguidance's own limit is lower
MAX_PATTERNS = 4  # that one value must match together
MAX_PATTERN_LENGTH = 2_000  # characters
MAX_MULTIPLES = 1  # `multipleOf` that one value must be together
MAX_COMBINATIONS = 256  # of alternatives that must match together
MAX_PROPERTIES = 4_000  # in all objects together
MAX_COMPARISONS = 1_000_000  # of an object's properties or a union's members with each other
MAX_VALUES = 1_000  # of an `enum` that must match a pattern as well, in all of them together
_ENORMOUS = 10**9  # numbers stop growing here


class Weight(NamedTuple):
    """The most that must match together at one place within a schema."""

    patterns: int = 0
    multiples: int = 0
    values: int = 0  # of an enum
    alternatives: int = 1


def check_enforceable(schemas: Sequence[dict[str, Any]]) -> None:
    """Raises InvalidRequest for schemas that take too long to compile, in one grammar."""
    try:
        length = len(json.dumps(schemas))
    except RecursionError:
        raise InvalidRequest("its schema is nested too deeply") from None
    if length > MAX_LENGTH:
        raise InvalidRequest(f"its schema has {length} characters; at most {MAX_LENGTH} will do")
    if len(schemas) > MAX_SCHEMAS:
        raise InvalidRequest(f"there are {len(schemas)} tools; at most {MAX_SCHEMAS} will do")
    totals = Totals()
    for schema in schemas:
        # Where a schema holds itself, the first pass does not know yet what it weighs.
        first = _Weigher(schema, Totals(), {})
        first.weigh(schema)
        _Weigher(schema, totals, first.weights).weigh(schema)
    for found, most, what in (
        (totals.patterns, MAX_PATTERNS, "patterns for one value"),
        (totals.multiples, MAX_MULTIPLES, "multipleOf for one value"),
        (totals.combinations, MAX_COMBINATIONS, "combinations of alternatives"),
        (totals.properties, MAX_PROPERTIES, "properties"),
        (totals.comparisons, MAX_COMPARISONS, "pairs of properties or alternatives"),
        (totals.values, MAX_VALUES, "values that must match a pattern, too"),
    ):
        if found > most:
            raise InvalidRequest(f"its schema has more than {most} {what}")


@dataclass
class Totals:
    """What several schemas have together or, of the first three, at most in one place."""

    patterns: int = 0
    multiples: int = 0
    combinations: int = 0
    properties: int = 0
    comparisons: int = 0
    values: int = 0


class _Weigher:
    """Weighs the parts of one schema, each once, and adds to `totals`. `weights` are those of an
    earlier pass, by the ids of schemas."""

    def __init__(self, root: dict[str, Any], totals: Totals, weights: dict[int, Weight]):
        self._root, self._totals = root, totals
        self.weights = weights.copy()
        self._done: set[int] = set()

    def weigh(self, schema: Any, depth: int = 0) -> Weight:
        """Raises InvalidRequest for what is nested too deeply, and for a pattern too long."""
        if not isinstance(schema, dict):
            return Weight()
        if depth > MAX_NESTING:
            raise InvalidRequest("its schema is nested too deeply")
        key = id(schema)
        if key not in self._done:
            self._done.add(key)
            self.weights[key] = self._weigh_anew(schema, depth + 1)
        return self.weights.get(key, Weight())

    def _weigh_anew(self, schema: dict[str, Any], depth: int) -> Weight:
        pattern, enum = schema.get("pattern"), schema.get("enum")
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_LENGTH:
            raise InvalidRequest(f"a pattern has more than {MAX_PATTERN_LENGTH} characters")
        own = Weight(
            isinstance(pattern, str) + ("format" in schema),
            int("multipleOf" in schema),
            len(enum) if isinstance(enum, list) else 0,
        )
        properties, totals = _members(schema, "properties"), self._totals
        number = max(len(properties), len(_list(schema, "required")))
        totals.properties += number
        totals.comparisons += number**2
        children = [*properties, *_list(schema, "prefixItems")]
        children += [schema.get("items"), schema.get("additionalProperties")]
        children = [self.weigh(child, depth) for child in children]
        # A property may have to match what stands under several patterns for names.
        named = [self.weigh(child, depth) for child in _members(schema, "patternProperties")]
        parts = [_heaviest([own, *children]), *named]
        parts += [self.weigh(one, depth) for one in _list(schema, "allOf")]
        for word in ("anyOf", "oneOf"):
            totals.comparisons += len(_list(schema, word)) ** 2
            if choices := [self.weigh(one, depth) for one in _list(schema, word)]:
                alternatives = sum(choice.alternatives for choice in choices)
                parts.append(_heaviest(choices)._replace(alternatives=alternatives))
        if isinstance(reference := schema.get("$ref"), str):
            parts.append(self.weigh(resolve(reference, self._root), depth))
        return self._together(parts, own)

    def _together(self, parts: list[Weight], own: Weight) -> Weight:
        """What parts weigh that must match together, which is where they take time."""
        parts = [part for part in parts if part != Weight()]
        weight = Weight(
            min(sum(part.patterns for part in parts), _ENORMOUS),
            min(sum(part.multiples for part in parts), _ENORMOUS),
            min(sum(part.values for part in parts), _ENORMOUS),
            min(math.prod(part.alternatives for part in parts), _ENORMOUS),
        )
        totals = self._totals
        totals.patterns = max(totals.patterns, weight.patterns)
        totals.multiples = max(totals.multiples, weight.multiples)
        if weight.patterns and (len(parts) > 1 or own.patterns and own.values):
            totals.values += weight.values
        if sum(part.alternatives > 1 for part in parts) > 1:
            totals.combinations = max(totals.combinations, weight.alternatives)
        return weight


def _heaviest(weights: list[Weight]) -> Weight:
    return Weight(*map(max, zip(*weights, strict=True)))


def _members(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return list(value.values()) if isinstance(value, dict) else []


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
