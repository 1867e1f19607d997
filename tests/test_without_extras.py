"""What works without torch, transformers and dask, and which extra an error names for everything else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from residua.store.base.extras import PACKAGES
from tests.store.small_archive import make_archive

WITHOUT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        is_absent = name.partition(".")[0] in {sorted({module for modules in PACKAGES.values() for module in modules})}
        return None if is_absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "error", "-c", WITHOUT + code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return run("from residua.pipelines.cli.main import main\nsys.exit(main())", *words)


def test_archives_are_opened_read_and_verified(tmp_path: Path) -> None:
    archive = str(make_archive(tmp_path / "a.zarr"))
    shown = run(
        "import residua; archive = residua.open(sys.argv[1]); print(archive[archive.sites[0]][:2].shape)", archive
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("(2, ")
    for job in ("info", "verify"):
        found = command(job, archive, "--json")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["sites", "--model", "m"], "capture"),
        (["capture", "--model", "m", "--dataset", "d", "--sites", "embed", "--out", "o"], "capture"),
        (["replay", "ARCHIVE", "--model", "m", "--out", "o"], "capture"),
        (["stats", "ARCHIVE"], "analysis"),
        (["lens", "train", "ARCHIVE", "--out", "o"], "analysis"),
        (["probe", "ARCHIVE", "--target", "position"], "analysis"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_job_says_which_extra_it_needs(tmp_path: Path, words: list[str], extra: str) -> None:
    archive = str(make_archive(tmp_path / "a.zarr"))
    found = command(*(archive if word == "ARCHIVE" else word for word in words))
    assert found.returncode == 2, found.stderr
    assert f"residua {words[0]}" in found.stderr
    assert f"pip install 'residua[{extra}]'" in found.stderr


def test_sending_to_the_hub_names_the_smallest_extra(tmp_path: Path) -> None:
    found = command("push", str(make_archive(tmp_path / "a.zarr")), "hf://datasets/org/acts")
    assert found.returncode == 2, found.stderr
    assert "pip install 'residua[hub]'" in found.stderr


@pytest.mark.parametrize(
    ("name", "extra"), [("tap", "capture"), ("stats", "analysis"), ("analysis.Loader", "analysis")]
)
def test_a_public_name_says_which_extra_it_needs(name: str, extra: str) -> None:
    found = run(f"import residua; residua.{name}")
    assert f"MissingPackageError: residua.{name} needs" in found.stderr
    assert f"pip install 'residua[{extra}]'" in found.stderr


def test_help_needs_no_extra() -> None:
    assert command("--help").returncode == 0
    assert command("capture", "--help").returncode == 0
