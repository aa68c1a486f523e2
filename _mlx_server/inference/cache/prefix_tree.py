"""A tree that finds values by the beginning of a token list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")

BLOCK = 64  # tokens that the first comparison of two lists takes; later ones take more


class Walk(NamedTuple, Generic[Value]):
    """How far a token list leads into a tree: `path` are the nodes whose whole way the list begins
    with, from the root on, each with the length of its way. `end` is where the list parts from
    everything in the tree, or ends: the last node of the path, or one whose edge it shares in part.
    `shared` is the number of tokens until there."""

    path: list[tuple[PrefixTree[Value], int]]
    end: PrefixTree[Value]
    shared: int


@dataclass(frozen=True, eq=False)
class PrefixTree(Generic[Value]):
    """A radix tree: values by lists of tokens, each found by any list that begins like its own.

    A node stands for the tokens of the edges from the root down to it. `value` belongs to exactly
    these, `marks` are further values that were noted for them. `sample` is some value at this node
    or below it, `value` itself if there is one.

    A tree never changes: `put`, `mark` and `remove` return another one that shares its unchanged
    nodes. So any thread may read one while another thread replaces it. What they cost grows with
    the length of the list and hardly with the number of values."""

    edge: list[int] = field(default_factory=list)
    children: dict[int, PrefixTree[Value]] = field(default_factory=dict)  # by first token
    value: Value | None = None
    marks: tuple[Value, ...] = ()
    sample: Value | None = field(init=False)

    def __post_init__(self) -> None:
        below = next(iter(self.children.values())).sample if self.children else None
        marked = self.marks[0] if self.marks else below
        object.__setattr__(self, "sample", marked if self.value is None else self.value)

    def walk(self, tokens: list[int], start: int = 0) -> Walk[Value]:
        """Follows a list of tokens from `start` on, as far as the tree knows it."""
        node, at = self, start
        path = [(node, 0)]
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            shared = common_prefix(child.edge, tokens, at)
            at += shared
            if shared < len(child.edge):
                return Walk(path, child, at - start)
            node = child
            path.append((node, at - start))
        return Walk(path, node, at - start)

    def values(self) -> Iterator[Value]:
        """All values, marks apart."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            if node.value is not None:
                yield node.value
            nodes += node.children.values()

    def put(self, tokens: list[int], value: Value) -> PrefixTree[Value]:
        """The tree with the value of a list set."""
        return self._changed(tokens, lambda node: replace(node, value=value))

    def remove(self, tokens: list[int]) -> PrefixTree[Value]:
        """The tree without the value of a list."""
        return self._changed(tokens, lambda node: replace(node, value=None))

    def mark(self, tokens: list[int], value: Value) -> PrefixTree[Value]:
        """The tree with a value noted for a list beside that list's own."""
        return self._changed(tokens, lambda node: replace(node, marks=(*node.marks, value)))

    def unmark(self, tokens: list[int], value: Value) -> PrefixTree[Value]:
        """The tree without that note, which must be there."""

        def without(node: PrefixTree[Value]) -> PrefixTree[Value]:
            at = node.marks.index(value)
            return replace(node, marks=node.marks[:at] + node.marks[at + 1 :])

        return self._changed(tokens, without)

    def _changed(
        self,
        tokens: list[int],
        change: Callable[[PrefixTree[Value]], PrefixTree[Value]],
    ) -> PrefixTree[Value]:
        """The tree with the node of a list changed, which is made if need be and goes when nothing
        is left of it."""
        path, end, shared = self.walk(tokens)
        if end is not path[-1][0]:
            path.append((_cut(end, shared - path[-1][1]), shared))
        node = path.pop()[0] if shared == len(tokens) else PrefixTree(tokens[shared:])
        node = change(node)
        while path:
            node = _with_child(path.pop()[0], node)
        return node


def _cut(node: PrefixTree[Value], length: int) -> PrefixTree[Value]:
    """A node for the beginning of another one's edge, with the rest of it below."""
    rest = replace(node, edge=node.edge[length:])
    return PrefixTree(node.edge[:length], {rest.edge[0]: rest})


def _with_child(node: PrefixTree[Value], child: PrefixTree[Value]) -> PrefixTree[Value]:
    """The node with a child set, or without it if nothing is left of it."""
    children = node.children.copy()
    if child.sample is None:
        children.pop(child.edge[0], None)
    else:
        children[child.edge[0]] = _joined(child)
    return replace(node, children=children)


def _joined(node: PrefixTree[Value]) -> PrefixTree[Value]:
    """The node, or one for it and its only child if nothing else is there."""
    if node.value is not None or node.marks or len(node.children) != 1:
        return node
    only = next(iter(node.children.values()))
    return replace(only, edge=node.edge + only.edge)


def common_prefix(a: list[int], b: list[int], start: int = 0) -> int:
    """How many leading items `a` shares with `b` from `start` on. Costs as much as they share:
    slices, which are compared in C, double in size, and the last one is halved. Only where the last
    items agree is all compared at once, since then all of it mostly agrees."""
    most = min(len(a), len(b) - start)
    ends_alike = most > 0 and a[most - 1] == b[start + most - 1]
    if ends_alike and _between(a, 0, most) == _between(b, start, start + most):
        return most
    at, size = 0, BLOCK
    while at < most:
        size = min(size, most - at)
        if a[at : at + size] != b[start + at : start + at + size]:
            break
        at += size
        size *= 2
    else:
        return most
    high = at + size - 1
    while at < high:
        middle = (at + high + 1) // 2
        if a[at:middle] == b[start + at : start + middle]:
            at = middle
        else:
            high = middle - 1
    return at


def _between(items: list[int], start: int, end: int) -> list[int]:
    """`items[start:end]`, and no copy if that is all of them: a long list takes longer to copy than
    to compare."""
    return items if (start, end) == (0, len(items)) else items[start:end]
