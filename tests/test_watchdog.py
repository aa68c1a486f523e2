"""A process that hangs ends, and says where."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

HANG = """
import threading, time
from _mlx_server.front.watchdog import Watchdog

def step():
    time.sleep(60)

threading.Thread(target=step, daemon=True).start()
began = time.monotonic()
with Watchdog(lambda: {hangs}, 1.0) as watchdog:
    {work}
print("went on")
"""


def run(hangs: str, work: str) -> subprocess.CompletedProcess[str]:
    program = HANG.format(hangs=hangs, work=work)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "hangs, work",
    [
        ("time.monotonic() > began + 0.1", "time.sleep(60)"),
        # A regular expression keeps the interpreter's lock
        ("False", "__import__('re').match('(a*)*b', 'a' * 40)"),
        ("False", "watchdog.end_within(0.2); time.sleep(60)"),
    ],
    ids=["step", "lock", "stop"],
)
def test_a_process_that_hangs_ends_and_says_where(hangs: str, work: str) -> None:
    ended = run(hangs, work)
    assert ended.returncode == 1
    assert "in step" in ended.stderr and "went on" not in ended.stdout


def test_a_process_that_works_goes_on() -> None:
    ended = run("False", "time.sleep(2.5)")
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
