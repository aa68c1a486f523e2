"""A client with a key for low priority that does nothing but harm. `ATTACK_SECONDS` says for how
long; the default is short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attack import ATTACKS, SLACK, besiege


@pytest.mark.slow
def test_a_low_key_does_not_stop_the_server(tmp_path: Path):
    seconds = float(os.environ.get("ATTACK_SECONDS", "10"))
    report, status = besiege(tmp_path / "keys", seconds, [*ATTACKS, "8"])
    assert status == 0 and report.attacks > 0 and len(report.attacked) >= 5
    assert report.after <= report.before + SLACK
