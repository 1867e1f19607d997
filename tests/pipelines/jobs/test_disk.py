"""Full and read-only disks, and paths that cannot be written: the error names the file and what to do."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.forking import Forks
from tests.ragged import capture_words, write_dataset
from tests.stopped import check_end

SITES = ("--sites", "resid_post.3,attn_out.1")
ROOMY = "64m"


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, which `resize` makes full or roomy; it needs root."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={ROOMY}", "residua-test", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def remount(disk: Path, options: str) -> None:
    mount("-o", f"remount,{options}", str(disk))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 18, seed=1)


@pytest.fixture(scope="module")
def reference(forks: Forks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "a.zarr"
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    return out


def no_temporary(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".making"))]


def test_disk_full_while_shards_are_written(forks: Forks, dataset: Path, reference: Path, disk: Path) -> None:
    out = disk / "a.zarr"
    remount(disk, "size=1200k")
    ended = forks.run(capture_words(dataset, out, *SITES))
    assert ended.code == 1, ended.output
    assert f"{out}/" in ended.output
    assert "the disk is full: free some space" in ended.output
    assert "run the same capture again" in ended.output
    assert "Traceback" not in ended.output
    assert no_temporary(disk)
    assert verify(out).problems == []
    assert 0 < len(Archive(out).commits) < len(Archive(reference).commits)
    remount(disk, f"size={ROOMY}")
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    check_end(out, reference)


@pytest.mark.parametrize(("size", "named"), [("4k", "examples/part"), ("300k", "head/head"), ("560k", "tokenizer")])
def test_disk_full_while_the_archive_is_made(
    size: str, named: str, forks: Forks, dataset: Path, reference: Path, disk: Path
) -> None:
    out = disk / "a.zarr"
    remount(disk, f"size={size}")
    ended = forks.run(capture_words(dataset, out, *SITES))
    assert ended.code == 2, ended.output
    assert f"{disk}/" in ended.output
    assert named in ended.output
    assert "free some space" in ended.output
    assert "Traceback" not in ended.output
    assert list(disk.iterdir()) == []
    remount(disk, f"size={ROOMY}")
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    check_end(out, reference)


def test_a_read_only_disk(forks: Forks, dataset: Path, reference: Path, disk: Path) -> None:
    out = disk / "a.zarr"
    remount(disk, "ro")
    ended = forks.run(capture_words(dataset, out, *SITES))
    assert ended.code == 2
    assert str(out) in ended.output
    assert "ead-only file system" in ended.output
    assert "Choose a folder that is writable" in ended.output
    remount(disk, "rw")
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    remount(disk, "ro")
    assert forks.run(["verify", out]).code == 0
    assert forks.run(["info", out]).code == 0
    check_end(out, reference)


def test_a_missing_parent_is_made(forks: Forks, dataset: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "a.zarr"
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    check_end(out, reference)


def test_a_file_in_the_way_is_kept(forks: Forks, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "a.zarr"):
        ended = forks.run(capture_words(dataset, out, *SITES))
        assert ended.code == 2
        assert str(out) in ended.output
        assert "Traceback" not in ended.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
