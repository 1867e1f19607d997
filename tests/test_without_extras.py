"""What works without torch, transformers and dask, and which extra an error names for everything else."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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


COMMANDS = """
import json, os
from residua.pipelines.cli.main import main

for line in sys.stdin:
    words, *files = json.loads(line)
    if not (child := os.fork()):
        for number, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs commands, each in a process of its own that has imported the command line and nothing more."""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "error", "-c", WITHOUT + code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    words = [sys.executable, "-W", "error", "-c", WITHOUT + COMMANDS]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, answers = process.stdin, process.stdout

        def done(*words: str) -> Done:
            files = [tmp_path_factory.mktemp("printed") / name for name in ("out", "err")]
            to.write(json.dumps([words, *map(str, files)]) + "\n")
            to.flush()
            return Done(int(answers.readline()), *(file.read_text() for file in files))

        yield done
        to.close()


def test_archives_are_opened_read_and_verified(command: Command, tmp_path: Path) -> None:
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
def test_a_job_says_which_extra_it_needs(command: Command, tmp_path: Path, words: list[str], extra: str) -> None:
    archive = str(make_archive(tmp_path / "a.zarr"))
    found = command(*(archive if word == "ARCHIVE" else word for word in words))
    assert found.returncode == 2, found.stderr
    assert f"residua {words[0]}" in found.stderr
    assert f"pip install 'residua[{extra}]'" in found.stderr


def test_sending_to_the_hub_names_the_smallest_extra(command: Command, tmp_path: Path) -> None:
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


def test_help_needs_no_extra(command: Command) -> None:
    assert command("--help").returncode == 0
    assert command("capture", "--help").returncode == 0
