"""A wheel built from the tree, installed elsewhere, is the whole program."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Server

pytestmark = pytest.mark.slow
NOT_SOURCE = (".*", "__pycache__", "build", "dist", "*.egg-info")


def run(*command: str | Path, folder: Path) -> str:
    out = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, folder=folder
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment. Its other packages are this environment's,
    but not an installation of the project: an editable one is a `.pth` file, which only counts in
    the environment's own folder."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder, folder=folder)
    run(folder / "bin/python", "-m", "pip", "install", "-q", "--no-deps", wheel, folder=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_every_file_of_the_product_is_in_the_wheel(wheel: Path):
    product = [*ROOT.glob("*.py"), *ROOT.glob("_mlx_server/**/*.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in product}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == expected
    page = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "_mlx_server/front/page").iterdir()
    }
    assert page < {*names}
    assert any(name.endswith("share/mlx-server/demo/model.safetensors") for name in names)


def test_the_installed_server_answers_with_the_demo(programs: Path, tmp_path: Path):
    server = Server(command=[str(programs / "mlx-server")], folder=tmp_path)
    try:
        payload = {"model": "demo", "prompt": "say hello", "stream": False}
        body = json.dumps(payload).encode()
        with urllib.request.urlopen(f"{server.url}/api/generate", body) as answer:
            assert json.load(answer)["response"] == "hello"
    finally:
        assert server.stop() == 0


def test_the_installed_engine_answers_with_the_demo(programs: Path, tmp_path: Path):
    code = (
        "import engine\n"
        "with engine.Engine('demo') as running:\n"
        "    print(engine.__file__, ''.join(running.chat('say hello').text()))"
    )
    file, answer = run(programs / "python", "-c", code, folder=tmp_path).split()
    assert Path(file).is_relative_to(programs.parent) and answer == "hello"


def make_wheel(folder: Path, name: str, system: str, needs: str = "") -> None:
    """A wheel of nothing but its name and what it needs."""
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-{system}.whl", "w") as wheel:
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}"
        )
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nTag: py3-none-{system}\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_formula_names_what_only_a_mac_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not shutil.which("uv"):
        pytest.skip("uv is not installed; the extra dev has it")
    metal = 'Requires-Dist: metal; platform_system == "Darwin"\n'
    make_wheel(
        tmp_path, "maths", "macosx_15_0_arm64", metal + "Requires-Dist: other; os_name == 'nt'\n"
    )
    make_wheel(tmp_path, "metal", "macosx_15_0_arm64")
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "one"\nversion = "1"\ndependencies = '
        "[\"maths; sys_platform != 'linux'\", \"linux; sys_platform == 'linux'\"]"
    )
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path))
    requirements = runpy.run_path(str(ROOT / "packaging" / "formula.py"))["requirements"]
    assert requirements(project) == ["maths==1.0", "metal==1.0"]
