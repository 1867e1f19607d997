"""Probes, directions, lenses and scores of heads at addresses of every kind: those of the folder served there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import residua
from residua.analysis.lens.checkpoint import LensConfig, Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import load_lm_head
from residua.analysis.page.directions import directions_of
from residua.analysis.page.heads import read_scores
from residua.analysis.probes.files import SavedProbe, write_probe
from residua.store.base.errors import AnalysisError
from residua.store.storage.objects import ObjectFolder
from tests.analysis.page.conftest import WIDTH, Made
from tests.servers.clouds import serving_cloud
from tests.servers.files import serving_files
from tests.servers.hub import serving_hub

pytestmark = pytest.mark.timeout(120)
MATRIX = np.random.default_rng(3).standard_normal((4, WIDTH))
SCORES = {"layer": [0, 1], "head": [0, 1], "score": [0.5, 0.25]}


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    np.save(folder / "one.npy", MATRIX[2])
    np.savez(folder / "sae.npz", dec=MATRIX)
    write_probe(folder / "probe=1", SavedProbe(MATRIX[:1], np.array([0.5]), 1.0, None, {"site": "resid_post.1"}))
    (folder / "heads").mkdir()
    pq.write_table(pa.table(SCORES), folder / "heads" / "measures.parquet")
    maps = {1: Translator(torch.eye(WIDTH), torch.ones(WIDTH))}
    head = load_lm_head(residua.open(made.archive).head)
    TunedLens(head, maps, LensConfig(base_model_name_or_path="none", d_model=WIDTH, num_hidden_layers=2)).save(
        folder / "lens"
    )
    return folder


@contextmanager
def served(kind: str, folder: Path, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Serve a folder, and yield its address and the options for it."""
    if kind == "http":
        with serving_files(folder) as server:
            yield server.url, {}
    elif kind == "hf":
        with serving_hub(tmp_path) as hub:
            hub.publish("org/results", folder)
            yield "hf://datasets/org/results", dict(hub.options)
    else:
        with serving_cloud("gs") as cloud:
            objects = ObjectFolder(cloud.address("results"), cloud.options)
            for path in filter(Path.is_file, folder.rglob("*")):
                objects.write(path.relative_to(folder).as_posix(), path)
            yield objects.address, cloud.options


@pytest.mark.parametrize("kind", ["http", "hf", "gs"])
def test_what_is_read_is_what_the_folder_holds(kind: str, made: Made, folder: Path, tmp_path: Path) -> None:
    archive = residua.open(made.archive)
    wanted = [
        "resid_post.1={}/one.npy",
        "mine:=resid_post.1={}/sae.npz#dec[3]",
        "{}/probe=1",
        "resid_post.0={}/probe=1",
    ]
    here = directions_of(archive, [each.format(folder) for each in wanted], None)
    with served(kind, folder, tmp_path) as (place, options):
        there = directions_of(archive, [each.format(place) for each in wanted], None, options)
        for one, other in zip(here, there, strict=True):
            assert (one.site, one.bias) == (other.site, other.bias)
            np.testing.assert_array_equal(one.vector, other.vector)
        assert residua.analysis.LinearProbe.load(f"{place}/probe=1", storage_options=options).coef_.shape == (WIDTH,)
        scores = [read_scores(f"{place}/heads{file}", options) for file in ("", "/measures.parquet")]
        assert scores == [read_scores(folder / "heads")] * 2
        lens = TunedLens.load(f"{place}/lens", storage_options=options)
        assert torch.equal(lens.translators[1].bias, torch.ones(WIDTH))
        found = residua.page(
            archive,
            tmp_path / "page",
            lens=f"{place}/lens",
            heads=f"{place}/heads",
            directions=[f"{place}/probe=1"],
            examples=2,
            lens_examples=1,
            storage_options=options,
        )
        assert found.n_examples >= 2
        for load in (TunedLens.load, residua.analysis.LinearProbe.load):
            with pytest.raises((AnalysisError, FileNotFoundError), match=f"{place}/nothing"):
                load(f"{place}/nothing", storage_options=options)
