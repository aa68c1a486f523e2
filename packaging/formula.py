"""Writes the Homebrew formula of a release, from the URL of its archive:

    python packaging/formula.py https://HOST/mlx-server-0.2.0.tar.gz > mlx-server.rb

It follows https://docs.brew.sh/Language-Specific-Formulae: every Python package that the program
needs is a resource with its checksum, as pip resolves them for macOS on Apple silicon, and goes
into an environment of the formula's own. What MLX consists of cannot be built by Homebrew from the
archives on PyPI, so the resources are wheels, which a tap may have.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = "3.13"
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [one for one in project["dependencies"] if "== 'linux'" not in one]
    wanted = [one.partition(";")[0] for one in needed]
    with urllib.request.urlopen(url) as archive:
        sha256 = hashlib.file_digest(archive, "sha256").hexdigest()
    return FORMULA.format(
        homepage=url.partition("/archive/")[0].partition("/releases/")[0],
        url=url,
        sha256=sha256,
        python=PYTHON,
        resources="\n".join(RESOURCE.format(**wheel) for wheel in wheels(wanted)),
    )


def wheels(wanted: list[str]) -> list[dict[str, str]]:
    """Name, URL and SHA-256 of each package that these requirements need on a Mac. Raises OSError
    if pip's index lies on this machine, where others cannot get it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        target = ["--target", folder, "--only-binary=:all:", "--python-version", PYTHON]
        platforms = [word for system in SYSTEMS for word in ("--platform", system)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        pip += ["--ignore-installed", "--report", str(report), *target, *platforms]
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
