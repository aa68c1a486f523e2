"""The phases of requests: in which order they are entered, and a place to hold the engine at."""

from __future__ import annotations

import threading

import pytest

from _mlx_server.inference.sequence import Sequence, State
from engine import Generation


class Hold:
    """Holds the MLX thread where requests have entered a phase for so many times, which has to be
    said before they are submitted. A `with` block begins once the thread stands still and lets it
    go on at its end."""

    def __init__(self, phase: State, times: int):
        self.phase, self.times = phase, times
        self._reached, self._go = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        assert self._reached.wait(60)

    def __exit__(self, *_: object) -> None:
        self._go.set()

    def entered(self, phase: State) -> None:
        """Called on the MLX thread."""
        self.times -= phase is self.phase
        if not self.times and not self._reached.is_set():
            self._reached.set()
            assert self._go.wait(60)


class Phases:
    """Notes the phases that requests enter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._entered: list[tuple[Sequence, State]] = []
        self._holds: list[Hold] = []
        enter = Sequence.enter

        def entering(sequence: Sequence, phase: State) -> None:
            enter(sequence, phase)
            self._entered.append((sequence, phase))
            for hold in self._holds:
                hold.entered(phase)

        monkeypatch.setattr(Sequence, "enter", entering)

    def hold(self, phase: State, times: int = 1) -> Hold:
        self._holds.append(Hold(phase, times))
        return self._holds[-1]

    def when(self, generation: Generation, phase: State) -> int:
        """The place of a request's first entry into a phase among all entries."""
        return self._entered.index((generation.sequence, phase))
