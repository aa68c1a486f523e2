"""Well-formed values of the types by which the vendors' SDKs describe requests."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import typing_extensions

TEXT = "aGk="  # any text, which is base64 as well
_DEEPEST = 5
_PLAIN = {str: TEXT, int: 1, float: 0.5, bool: True, object: {}, Any: {}, type(None): None}


def members(hint: Any) -> Iterator[Any]:
    """The types that a union names, unions in it taken apart; another type is its only member."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for inner in typing.get_args(hint):
            yield from members(inner)
    elif typing.get_origin(hint) is typing.Annotated:
        yield from members(typing.get_args(hint)[0])
    else:
        yield hint


def samples(hint: Any, depth: int = _DEEPEST) -> Iterator[Any]:
    """Values of a type. Each member of a union, and each value and each absence of a field, is in
    at least one of them, down to a depth."""
    for member in members(hint):
        yield from _samples(member, depth)


def _samples(hint: Any, depth: int) -> Iterator[Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Required, typing.NotRequired):
        yield from samples(args[0], depth)
    elif origin is typing.Literal:
        yield from args
    elif typing_extensions.is_typeddict(hint):
        yield from _objects(hint, depth)
    elif origin in (dict, Mapping) or hint is dict:
        yield {}
    elif origin in (list, Iterable, Sequence):
        yield from ([value] for value in samples(args[0], depth - 1)) if depth else [[]]
    elif hint in _PLAIN:
        yield _PLAIN[hint]
    # Others are objects of Python, such as files and answers, which the SDK sends as one of the
    # types that stand beside them


def _objects(hint: Any, depth: int) -> Iterator[dict]:
    """The smallest object, and for each value of each field an object that differs in it."""
    fields = typing_extensions.get_type_hints(hint, include_extras=True)
    # What the class says of its keys is wrong where its annotations are strings
    required = [key for key in fields if typing.get_origin(fields[key]) is typing.Required]
    required += [key for key in fields if hint.__total__ and key not in required]
    smallest = {key: next(samples(fields[key], depth - 1)) for key in required}
    yield smallest
    if depth:
        for key, inner in fields.items():
            yield from ({**smallest, key: value} for value in samples(inner, depth - 1))
