"""Calls take the model first, then the archive; the former order works once more and warns."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.pipelines.setup.models import model_first
from tests.models.tiny import TINY
from tests.store.small_archive import make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> residua.Archive:
    return residua.open(make_archive(tmp_path_factory.mktemp("a") / "a.zarr"))


def test_the_former_order_works_and_warns(archive: residua.Archive, tmp_path: Path) -> None:
    model, name = TINY["gpt2"](), str(tmp_path)
    for first, second in ((archive, model), (str(archive.path), model), (archive.path, name), ("s3://b/a.zarr", name)):
        with pytest.warns(DeprecationWarning, match="model first"):
            assert model_first(first, second, "residua.reproduce") == (second, first)
        assert model_first(second, first, "residua.reproduce") == (second, first)


def test_reproduce_takes_both_orders(tmp_path: Path) -> None:
    model = TINY["gpt2"]()
    prompts = [np.arange(5, 9).tolist()]
    captured = residua.run(model, prompts, sites="embed").save(tmp_path / "a.zarr")
    assert residua.reproduce(model, captured).is_exact
    with pytest.warns(DeprecationWarning, match=r"residua\.reproduce"):
        assert residua.reproduce(captured.path, model).is_exact  # type: ignore[arg-type]  # the former order


def test_an_open_archive_stands_for_its_path(archive: residua.Archive) -> None:
    assert Path(archive) == archive.path
    assert residua.open(Path(archive)).sites == archive.sites
    assert residua.verify(archive).is_sound
    residua.pack(archive)
