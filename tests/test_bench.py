"""The benchmark's table, between two servers of ours and as a picture. What the figures are is
nobody's test."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import bench
import pytest
from conftest import Server, example

NUMBER = r"([\d.,]+(?:e[+-]\d+)?)"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "table.png"


@pytest.fixture(scope="module")
def printed(server: Server, picture: Path) -> str:
    """The table of the README's command, for two servers of which the second speaks Ollama's
    API."""
    other, out = Server(), io.StringIO()
    plot = ["--plot", str(picture)] if find_spec("matplotlib") else []
    shown = example("bench.py").replace("http://localhost:11434", other.url)
    flags = shlex.split(shown.replace("qwen3:8b", "demo"))[2:]
    flags += ["--minutes", "0.02", "--url", server.url, "--against-api", "ollama"]
    try:
        with contextlib.redirect_stdout(out):
            bench.main([*flags, *plot])
    finally:
        assert other.stop() == 0
    return out.getvalue()


@pytest.mark.slow
def test_every_row_of_the_table_has_numbers_for_both_servers(printed: str):
    rows = re.findall(rf"^[↑↓] (.+?) \(\S+\) +{NUMBER} +(≤ )?{NUMBER} +{NUMBER}$", printed, re.M)
    assert [title for title, *_ in rows] == [row.title for row in bench.ROWS], printed
    assert rows[2][1] == "1", "the server has prefilled something twice"
    # Ollama's API does not tell
    assert [title for title, _, guessed, *_ in rows if guessed] == ["prefilled per new token"]
    assert "asked in its API 'messages'" in printed and "mlx-server 0." in printed


@pytest.mark.slow
def test_the_table_is_drawn(printed: str, picture: Path):
    pytest.importorskip("matplotlib")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_grown_prompt_is_timed(capsys: pytest.CaptureFixture):
    bench.main(["render"])
    *growing, last = capsys.readouterr().out.splitlines()
    assert len(growing) == 5 and re.match(rf"median ratios {NUMBER} and {NUMBER}$", last)


@pytest.mark.slow
def test_a_recorded_session_sent_again_is_reused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
):
    messages = [{"role": "user", "content": "say hello " * 50}]
    grown = [*messages, {"role": "assistant", "content": "hello"}, *messages]
    trace = tmp_path / "trace.json"
    bodies = [{"body": {"messages": messages}}, {"body": {"messages": grown}}]
    trace.write_text(json.dumps({"requests": bodies}))
    bench.main(["reuse", "--trace", str(trace), "--url", server.url])
    *_, last = capsys.readouterr().out.splitlines()
    share = re.match(r"reused \d+ of \d+ reusable tokens: (\S+)%$", last)
    assert share and float(share[1]) > 90


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--url", "http://127.0.0.1:9"], "bench: http://127.0.0.1:9 cannot be asked: "),
        (["--model", "nobody:7b"], "bench: model 'nobody:7b' not found"),
        (["loops"], "there is no part of the table named loops"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as error:
        bench.main(flags)
    assert sentence in f"{error.value} {capsys.readouterr().err}"
