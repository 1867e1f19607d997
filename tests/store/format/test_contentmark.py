"""A folder's mark changes with anything in it, and with nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import residua
from residua.store.format.contentmark import content_mark
from tests.store.small_archive import make_archive


def test_an_overlay_that_is_written_to_has_another_mark(tmp_path: Path) -> None:
    archive = residua.open(make_archive(tmp_path / "a.zarr"))
    site = archive.sites[0]
    overlay = residua.overlay(archive, tmp_path / "o")
    before = content_mark(tmp_path / "o")
    rows = np.zeros((1, *archive[site].shape[1:]), np.float32)
    overlay.write(site, [0], rows)
    once = content_mark(tmp_path / "o")
    overlay.write(site, [0], rows + 1)
    assert len({before, once, content_mark(tmp_path / "o")}) == 3


def test_a_checkpoint_that_is_trained_again_has_another_mark(tmp_path: Path) -> None:
    marks = set()
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save({"0.weight": torch.randn(400, 400)}, tmp_path / "params.pt")
        marks.add(content_mark(tmp_path))
    assert len(marks) == 2


def test_an_archive_is_marked_by_its_metadata_and_commits(tmp_path: Path) -> None:
    make_archive(tmp_path / "a.zarr")
    before = content_mark(tmp_path / "a.zarr")
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert content_mark(tmp_path / "b.zarr") == before
    next((tmp_path / "b.zarr" / "commits").iterdir()).unlink()
    assert content_mark(tmp_path / "b.zarr") != before


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    with pytest.raises(FileNotFoundError, match=r"zarr\.json"):
        content_mark(tmp_path)
