"""Takes a request's caches back to an earlier length, behind a pass that has read too many tokens.

Keys and values of tokens that do not count are cut off. A recurrent state cannot be cut: the state
from before the pass is put back, and only the layers that own such states read the tokens that
count once more. The pass as a whole is never repeated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TRIMMED = {"KVCache", "QuantizedKVCache", "ChunkedKVCache"}
_SLICED = {"RotatingKVCache", "ConcatenateKVCache"}
_RECURRENT = {"ArraysCache"}


class Unsupported(Exception):
    """A model whose caches cannot be taken back; the message says which of them."""


class Rollback:
    """The caches of a model, taken back behind a pass. On the MLX thread.

    `begin` comes before a pass, `keep` behind it. `width` is how many tokens the pass reads,
    `calls` notes what recurrent layers do in it. Raises Unsupported for a model that has a cache
    class which is not known here, or a recurrent state that no layer was seen to read, or whose
    sliding window is wider in a pass of several tokens."""

    def __init__(self, model: Any, cache: list[Any]):
        """`cache` is a new one, which is used up."""
        for layer in _leaves(cache):
            if type(layer).__name__ not in _TRIMMED | _SLICED | _RECURRENT:
                raise Unsupported(f"its cache class {type(layer).__name__} is not known")
        self.calls = _Calls()
        windows = [leaf for leaf in _leaves(cache) if hasattr(leaf, "max_size")]
        masks = [_note_window(leaf) for leaf in windows]
        if windows or any(map(_is_recurrent, cache)):
            self.calls.watch(model, cache)
        pairs = zip(windows, masks, strict=True)
        if any(window > leaf.max_size for leaf, seen in pairs for window in seen):
            raise Unsupported("it sees further when it reads several tokens than when it reads one")
        self._cache: list[Any] = []
        self.width = 0
        self._before: dict[int, dict[str, Any]] = {}

    def begin(self, cache: list[Any], width: int) -> None:
        """A pass is about to read `width` tokens, at least 2, into `cache`."""
        self._cache, self.width = cache, width
        self._before = {
            id(leaf): _attributes(leaf)
            for layer in cache
            if _is_recurrent(layer)
            for leaf in _leaves([layer])
        }
        self.calls.start()

    def keep(self, kept: int) -> None:
        """Takes the caches back to the first `kept` tokens of the pass, at least one."""
        calls = self.calls.stop()
        cache, self._cache = self._cache, []
        before, self._before = self._before, {}
        if kept == self.width:
            return
        for layer in cache:
            for leaf in _leaves([layer]):
                if _is_recurrent(layer):
                    _put_back(leaf, before[id(leaf)], self.width)
                else:
                    _cut(leaf, self.width - kept)
        for module, args, kwargs in calls:
            args = tuple(_first(value, kept, self.width) for value in args)
            kwargs = {name: _first(value, kept, self.width) for name, value in kwargs.items()}
            module(*args, **kwargs)


def _leaves(layers: Any) -> Iterator[Any]:
    """The caches that hold arrays: a layer may have several of them."""
    for layer in layers:
        if type(layer).__name__ == "CacheList":
            yield from _leaves(layer.caches)
        else:
            yield layer


def _is_recurrent(layer: Any) -> bool:
    return any(type(leaf).__name__ in _RECURRENT for leaf in _leaves([layer]))


def _note_window(leaf: Any) -> list[int]:
    """A list to which the windows are added that masks for this cache are made for."""
    seen, make_mask = [], leaf.make_mask

    def note(*args: Any, window_size: int | None = None, **kwargs: Any) -> Any:
        seen.append(window_size or 0)
        return make_mask(*args, window_size=window_size, **kwargs)

    leaf.make_mask = note
    return seen


def _cut(leaf: Any, surplus: int) -> None:
    """Takes the last tokens out of a cache of keys and values."""
    if type(leaf).__name__ in _TRIMMED:
        leaf.trim(surplus)
        return
    # A pass of several tokens has left a window in order, with as many tokens before the pass as
    # its first token sees. mlx-lm's own `trim` keeps the keys, or refuses once the window is full.
    end = leaf.keys.shape[2] - surplus
    leaf.keys, leaf.values = leaf.keys[..., :end, :], leaf.values[..., :end, :]
    leaf.offset -= surplus
    if type(leaf).__name__ == "RotatingKVCache":
        leaf.state = (*leaf.state[:5], end)


def _attributes(leaf: Any) -> dict[str, Any]:
    """A cache's attributes, lists copied. A pass of several tokens puts new arrays there and
    changes none, but for those of the classes that can be trimmed."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(leaf).items()
    }


def _put_back(leaf: Any, before: dict[str, Any], width: int) -> None:
    if type(leaf).__name__ in _TRIMMED:
        leaf.trim(width)
    else:
        vars(leaf).update(before)


def _first(value: Any, kept: int, width: int) -> Any:
    """The part of an argument that belongs to the first `kept` of `width` tokens: of hidden states
    (1, width, ...), of a mask (..., width, length) of which all but those have come before."""
    shape: tuple[int, ...] = getattr(value, "shape", ())
    if len(shape) >= 2 and shape[0] == 1 and shape[1] == width:
        return value[:, :kept]
    if len(shape) >= 2 and shape[-2] == width:
        return value[..., :kept, : shape[-1] - width + kept]
    return value


class _Calls:
    """The calls in which a model's layers read recurrent states, noted during a pass so that they
    can be repeated. A layer is made to note its calls by giving it a subclass of its own class."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None

    def start(self) -> None:
        self._noted = []

    def stop(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """The calls since the start, in order; those behind it are not noted."""
        noted, self._noted = self._noted or [], None
        return noted

    def watch(self, model: Any, cache: list[Any]) -> None:
        """Finds the layers that read recurrent states, those deepest inside the model, by a pass of
        two tokens, of which nothing is computed. Raises Unsupported."""
        import mlx.core as mx

        wanted = {id(layer) for layer in cache if _is_recurrent(layer)}
        members = {id(leaf): id(layer) for layer in cache for leaf in _leaves([layer])}
        modules = {id(module): module for _, module in model.named_modules()}
        classes = {key: type(module) for key, module in modules.items()}
        found: list[tuple[Any, set[int]]] = []
        for module in modules.values():
            _subclass(module, lambda *call: _trace(found, members, *call))
        try:
            model(mx.array([[0, 0]]), cache=cache)
        finally:
            for key, module in modules.items():
                module.__class__ = classes[key]
        readers = {id(module): module for module, read in found if read & wanted}
        if missing := wanted - {layer for _, read in found for layer in read}:
            raise Unsupported(f"no layer was seen to read {len(missing)} of its recurrent states")
        for module in readers.values():
            _subclass(module, self._call)

    def _call(self, call: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._noted is not None:
            self._noted.append((module, args, kwargs))
        return call(*args, **kwargs)


def _subclass(module: Any, around: Any) -> None:
    """Has `around(call, module, args, kwargs)` answer a module's calls; `call` is the module's own
    way to do so."""
    base = type(module)

    class Watched(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return around(super().__call__, self, args, kwargs)

    Watched.__name__ = Watched.__qualname__ = base.__name__
    Watched.__module__ = base.__module__
    module.__class__ = Watched


def _trace(
    found: list[tuple[Any, set[int]]],
    members: dict[int, int],
    call: Any,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Notes a module with the layers' caches that it was given, unless a module inside it was given
    them, too."""
    given = {
        members.get(id(leaf))
        for value in (*args, *kwargs.values())
        if hasattr(value, "nbytes") and hasattr(value, "state")
        for leaf in _leaves([value])
    } - {None}
    first = len(found)
    result = call(*args, **kwargs)
    inner = {layer for _, read in found[first:] for layer in read}
    if read := {layer for layer in given if layer is not None} - inner:
        found.append((module, read))
    return result
