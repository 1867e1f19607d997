"""The documentation site builds without a warning, and its reference has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import residua
from tests.pages import ROOT
from tests.pipelines.cli.test_help import COMMANDS

NAMES = [f"residua {command}" for command in COMMANDS]
NAMES += [f"residua.{name}" for name in residua.__all__] + [
    f"residua.analysis.{name}" for name in residua.analysis.__all__
]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_for_users_has_every_command_and_name(name: str) -> None:
    lists = ("architecture.md", "models-table.md", "reference.md")
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name not in lists]
    assert [path.name for path in pages if re.search(rf"\b{re.escape(name)}\b", path.read_text())]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    options = ["-c", "docs", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r'id="residua\.([\w.]+)"', (tmp_path / "site/docs/reference.html").read_text()))
    missing = set(residua.__all__) - shown - {"analysis"}
    assert not missing, f"docs/reference.md lacks {sorted(missing)}"
    (first,) = re.findall(r"url=([^\"]+)", (tmp_path / "site/index.html").read_text())
    assert (tmp_path / "site" / first).is_file()
