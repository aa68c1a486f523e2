"""Writes the Homebrew formula of a release, from the URL of its archive:

    python packaging/formula.py https://HOST/mlx-server-0.2.0.tar.gz > mlx-server.rb

It follows https://docs.brew.sh/Language-Specific-Formulae: every Python package that the program
needs is a resource with its checksum, and goes into an environment of the formula's own. What MLX
consists of cannot be built by Homebrew from the archives on PyPI, so the resources are wheels,
which a tap may have. It takes uv, on any system: what a Mac needs (`mlx-metal`, say) hangs on
conditions, and pip only knows those of the machine it runs on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = "3.13"
MACOS = "15.0"  # Sequoia, the oldest that the formula takes
SYSTEMS = [f"macosx_{version}_arm64" for version in ("15_0", "14_0", "13_0", "12_0", "11_0")]
SYSTEMS += ["macosx_10_13_universal2", "macosx_10_9_universal2"]
FORMULA = """\
class MlxServer < Formula
  include Language::Python::Virtualenv

  desc "Small server for local MLX models with Anthropic, Ollama and OpenAI APIs"
  homepage "{homepage}"
  url "{url}"
  sha256 "{sha256}"
  license "MIT"

  depends_on arch: :arm64
  depends_on "libyaml" # which brew's style check wants beside pyyaml
  depends_on macos: :sequoia
  depends_on "python@{python}"

{resources}
  def install
    venv = virtualenv_create(libexec, "python{python}")
    resources.each do |wheel|
      wheel.stage {{ venv.pip_install Dir[Pathname.pwd/"*.whl"].map {{ |file| Pathname(file) }} }}
    end
    venv.pip_install_and_link buildpath
  end

  service do
    run [opt_bin/"mlx-server"]
    keep_alive crashed: true
    log_path var/"log/mlx-server.log"
    error_log_path var/"log/mlx-server.log"
  end

  test do
    assert_match "demo", shell_output("#{{bin}}/mlx-server list")
    assert_match version.to_s, shell_output("#{{bin}}/mlx-server --version")
  end
end
"""
RESOURCE = """\
  resource "{name}" do
    url "{url}", using: :nounzip
    sha256 "{sha256}"
  end
"""


def formula(url: str) -> str:
    """The formula's text. Raises OSError if the archive cannot be had."""
    wanted = requirements(ROOT / "pyproject.toml")
    with urllib.request.urlopen(url) as archive:
        sha256 = hashlib.file_digest(archive, "sha256").hexdigest()
    return FORMULA.format(
        homepage=url.partition("/archive/")[0].partition("/releases/")[0],
        url=url,
        sha256=sha256,
        python=PYTHON,
        resources="\n".join(RESOURCE.format(**wheel) for wheel in wheels(wanted)),
    )


def requirements(project: Path) -> list[str]:
    """Every package that this `pyproject.toml` needs on a Mac, as NAME==VERSION."""
    uv = ["uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--only-binary=:all:"]
    uv += ["--python-platform", "aarch64-apple-darwin", "--python-version", PYTHON]
    env = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
    found = subprocess.run([*uv, project], check=True, env=env, stdout=subprocess.PIPE, text=True)
    return found.stdout.split()


def wheels(wanted: list[str]) -> list[dict[str, str]]:
    """Name, URL and SHA-256 of each of these packages' wheel for a Mac. Raises OSError if pip's
    index lies on this machine, where others cannot get it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        target = ["--target", folder, "--only-binary=:all:", "--python-version", PYTHON]
        platforms = [word for system in SYSTEMS for word in ("--platform", system)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        pip += ["--no-deps", "--ignore-requires-python", "--ignore-installed"]  # uv has seen to it
        pip += ["--report", str(report), *target, *platforms]
        subprocess.run([*pip, *wanted], check=True)
        installed = json.loads(report.read_text("utf-8"))["install"]
    found = [
        {
            "name": re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower(),
            "url": one["download_info"]["url"],
            "sha256": one["download_info"]["archive_info"]["hashes"]["sha256"],
        }
        for one in installed
    ]
    for one in found:
        if not one["url"].startswith("https://"):
            raise OSError(f"{one['name']} comes from {one['url']}, which others cannot reach")
    return sorted(found, key=lambda one: one["name"])


if __name__ == "__main__":
    print(formula(sys.argv[1]), end="")
