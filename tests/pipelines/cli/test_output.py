"""What the command line writes where nobody looks, and where small work runs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from residua.analysis.support import cluster
from residua.pipelines.cli import archive as archive_commands
from residua.pipelines.cli import options
from residua.pipelines.cli.main import main
from residua.store.read.stacks import open_archive
from tests.store.small_archive import make_archive


class _StartedError(Exception):
    """Raised where worker processes would be started."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("a") / "a.zarr")


@pytest.mark.parametrize(
    ("is_seen", "words", "is_drawn"), [(True, [], True), (True, ["--quiet"], False), (False, [], False)]
)
def test_progress_is_drawn_for_a_person_only(
    is_seen: bool,
    words: list[str],
    is_drawn: bool,
    archive: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_seen)
    assert main(["verify", str(archive), *words]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("sound")
    assert bool(found.err) == is_drawn


@pytest.mark.parametrize(("is_seen", "words"), [(True, []), (True, ["--quiet"]), (True, ["--json"]), (False, [])])
def test_libraries_draw_bars_for_a_person_only(
    is_seen: bool, words: list[str], archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in switches:
        monkeypatch.delenv(name, raising=False)
    found = []

    def look(_: object) -> int:
        found.append([os.environ.get(name) for name in switches])
        return 0

    monkeypatch.setattr(archive_commands, "_info", look)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_seen)
    assert main(["info", str(archive), *words]) == 0
    assert found == [[None, None] if is_seen and not words else ["1", "1"]]
    assert not any(name in os.environ for name in switches)


def test_a_reader_that_goes_away_ends_a_command_quietly(archive: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from residua.pipelines.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "info", str(archive)]
    found = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "starts"), [([], False), (["--workers", "1"], True), (["--scheduler", "inline"], False)]
)
def test_small_work_runs_in_this_process(
    words: list[str], starts: bool, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any) -> Callable[..., None]:
        raise _StartedError

    monkeypatch.setattr(cluster, "_local", start)
    monkeypatch.chdir(tmp_path)
    call = ["stats", str(archive), *words]
    if starts:
        with pytest.raises(_StartedError):
            main(call)
    else:
        assert main(call) == 0


def test_little_data_is_counted_by_the_sites_that_are_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options._SMALL_BYTES >= 27 * 2**20
    opened = open_archive(archive)
    site = min(opened.plan.sites, key=lambda one: one.row_bytes)
    monkeypatch.setattr(options, "_SMALL_BYTES", opened.n_rows * site.row_bytes)

    def start(*_: Any) -> Callable[..., None]:
        raise _StartedError

    monkeypatch.setattr(cluster, "_local", start)
    monkeypatch.chdir(tmp_path)
    assert main(["top", str(archive), "--site", site.name, "--channel", "0"]) == 0
    for words in (["stats"], ["probe", "--sites", site.name, "--target", "position"]):  # more sites, more passes
        with pytest.raises(_StartedError):
            main([words[0], str(archive), *words[1:]])
    monkeypatch.setattr(options, "_SMALL_BYTES", options.MANY_PASSES * opened.n_rows * site.row_bytes)
    assert main(["probe", str(archive), "--sites", site.name, "--target", "position"]) == 0
