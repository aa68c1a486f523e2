"""`doctor`: one screen for a bug report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, Server


def doctor(*flags: str, **env: str) -> dict[str, list[str]]:
    """What is said, by the first word of its line."""
    out = subprocess.run(
        [sys.executable, str(ROOT / "mlx_server.py"), "doctor", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **env},
    )
    assert out.returncode == 0 and out.stderr == "", out.stderr
    said: dict[str, list[str]] = {}
    for line in out.stdout.splitlines():
        key, _, value = line.partition("  ")
        said.setdefault(key, []).append(value.strip())
    assert len(out.stdout.splitlines()) < 40
    return said


def test_what_a_report_needs_is_on_one_screen(server: Server, tmp_path: Path):
    shutil.copytree(ROOT / "tests" / "demo", tmp_path / "Good-1B-4bit")
    (tmp_path / "org" / "Gguf").mkdir(parents=True)
    (tmp_path / "org" / "Gguf" / "x.gguf").touch()
    flags = ["--models-dir", str(tmp_path), "--models-dir", "/no/such"]
    said = doctor(*flags, "--port", str(server.port))
    assert said["mlx-server"][0].startswith("0.") and str(ROOT) in said["mlx-server"][0]
    assert said["python"][0].endswith(sys.executable)
    for part in ("mlx 0.", "mlx-lm 0.", "transformers", "huggingface_hub"):
        assert part in said["packages"][0]
    assert "constrained: 1." in said["extras"][0] and "documents: " in said["extras"][0]
    assert "vision: " in said["extras"][0]
    assert "claude: " in said["agents"][0] and "can be used" in said["MLX"][0]
    assert "free for" in said["disk"][0]
    port = said[f"port {server.port}"][0]
    assert port.startswith("a server runs, mlx-server 0.") and "in memory" in port
    assert said["models"][0].startswith("* Good-1B-4bit, 5 MB, in")
    assert any("org/Gguf is not an MLX model: it holds GGUF" in line for line in said["skipped"])
    assert "/no/such does not exist" in said["skipped"]
