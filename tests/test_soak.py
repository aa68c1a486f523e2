"""The server under everything at once. `SOAK_SECONDS` says for how long; the default is short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Server
from models import build_model
from soak import KINDS, Soak, figure, memory


@pytest.mark.slow
def test_a_long_day_with_many_clients(tmp_path: Path):
    for kind in ("qwen2", "llama_sliding", "hybrid"):
        build_model(kind, tmp_path / kind)
    server = Server("--models-dir", str(tmp_path), "--max-loaded", "2", "--prompt-cache", "64MB")
    try:
        others = ["qwen2", "llama_sliding", "hybrid"]
        soak = Soak(server.port, 32, others, seconds=float(os.environ.get("SOAK_SECONDS", "20")))
        soak.learn()
        before = memory(server.port, others)
        report = soak.run()
        assert not report.wrong, report.wrong[:5]
        assert all(report.done[kind] for kind in KINDS)
        assert figure(server.url, "prefix_cache_bytes") <= 64 * 2**20
        assert memory(server.port, others) <= 1.05 * before
        assert figure(server.url, "up") == 1
    finally:
        assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]
