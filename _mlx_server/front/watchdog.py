"""Ends a process that hangs, so that its supervisor starts another."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable

log = logging.getLogger("mlx_server")


class Watchdog:
    """Ends the process, with the stacks of all threads on stderr and status 1, when `hangs` says
    so, or when no Python code has run for `limit` seconds because one thread keeps the
    interpreter's lock.

    faulthandler's timer needs no lock. A thread sets it again and again, as long as it runs."""

    def __init__(self, hangs: Callable[[], bool], limit: float):
        self._hangs, self._limit = hangs, limit
        self._setting = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._setting:
            if not self._over.is_set():
                self._over.set()
                faulthandler.cancel_dump_traceback_later()

    def end_within(self, seconds: float) -> None:
        """Ends the process if it still runs then."""
        with self._setting:
            if not self._over.is_set():
                self._over.set()
                _set_timer(seconds)

    def _watch(self) -> None:
        while True:
            if self._hangs():
                log.critical("the engine hangs; the process ends")
                self.end_within(1)
            with self._setting:
                if self._over.is_set():
                    return
                _set_timer(self._limit)
            self._over.wait(self._limit / 8)


def _set_timer(seconds: float) -> None:
    try:
        number = sys.__stderr__.fileno() if sys.__stderr__ else _nowhere()
        faulthandler.dump_traceback_later(seconds, exit=True, file=number)
    except (OSError, ValueError):  # stderr is closed
        faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere())


@functools.cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)
