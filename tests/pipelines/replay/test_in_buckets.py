"""Replays, sweeps, runs and fidelity whose results go into a bucket: what a folder gets, also after a stop."""

from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel

import residua
from residua.pipelines.circuits.circuit_settings import RepeatSettings
from residua.pipelines.circuits.induction import capture_repeats, score_repeats
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.storage.lease import leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from tests.capture.replay_samples import captured, model_of
from tests.servers.objects import files, objects
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(300)
EDIT = {"edit": "scale", "site": "mlp_out.1", "by": 0.5, "positions": "2:"}
REQUEST: dict[str, Any] = {"at": "resid_post.0", "edits": [EDIT], "capture": "resid_post.2,final"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of("llama")


@pytest.fixture(scope="module")
def archive(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    settings = {"sites": "resid_post.*", "codec": "int8-block32", "rows_per_shard": 16}
    return captured(model, tmp_path_factory.mktemp("replayed") / "a", **settings)


def test_a_replay_and_what_follows(model: PreTrainedModel, archive: Archive, s3: S3Server, tmp_path: Path) -> None:
    disk = residua.replay_dataset(model, archive, out=tmp_path / "out", **REQUEST)
    out, options = s3.address("replayed/out"), cast("Any", {"storage_options": s3.options})

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        residua.replay_dataset(model, archive, out=out, **REQUEST, **options, on_example=stop)
    there = objects(out, s3.options)
    assert "residua.json" in there
    with pytest.raises(PlanError, match="another request"):
        residua.replay_dataset(model, archive, out=out, at="resid_post.1", **options)
    with leased(ObjectFolder(out, s3.options)), pytest.raises(ArchiveInUseError, match="replayed"):
        residua.replay_dataset(model, archive, out=out, **REQUEST, **options)
    found = residua.replay_dataset(model, archive, out=out, **REQUEST, **options)
    assert (found.folder, found.resumed, disk.resumed) == (out, True, False)
    assert found.examples.equals(disk.examples)
    assert found.tokens.equals(disk.tokens)
    assert found.archive is not None
    assert found.archive.place == f"{out}/acts.zarr"
    assert objects(out, s3.options) == files(tmp_path / "out")
    again = residua.replay_dataset(model, archive, out=out, **REQUEST, **options)
    assert again.tokens.equals(disk.tokens)
    with pytest.raises(PlanError, match=r"not empty"):
        residua.replay_dataset(model, archive, out=s3.address("replayed"), **REQUEST, **options)


def test_fidelity_of_an_archive_in_a_bucket(model: PreTrainedModel, archive: Archive, s3: S3Server) -> None:
    address = s3.address("fidelity.zarr")
    residua.push(archive.path, address, storage_options=s3.options)
    found = residua.fidelity(model, address, n_batches=2, storage_options=s3.options)
    assert found == residua.fidelity(model, archive, n_batches=2)
    assert objects(address, s3.options)["fidelity.json"] == (archive.path / "fidelity.json").read_bytes()
    there = residua.open(address, storage_options=s3.options)
    assert [site.fidelity for site in summarise(there).sites] == [found.sites[name] for name in there.sites]
    assert residua.verify(address, storage_options=s3.options).is_sound


def test_sweeps(model: PreTrainedModel, s3: S3Server, tmp_path: Path) -> None:
    pairs = [{"clean": [3, 9, 27, 81], "corrupted": [3, 9, 30, 81], "answer": 7, "wrong": 11}]
    for way in (residua.patch, residua.attribute):
        out = s3.address(f"swept/{way.__name__}")
        found = way(model, pairs, sites="resid_post.*", out=out, storage_options=s3.options)
        assert found.equals(way(model, pairs, sites="resid_post.*"))
        there = objects(out, s3.options)
        assert there.keys() == {"cells.parquet", "cells.png"}
        (tmp_path / "cells.parquet").write_bytes(there["cells.parquet"])
        assert pq.read_table(tmp_path / "cells.parquet").equals(found)


def test_a_run_is_saved(model: PreTrainedModel, s3: S3Server, tmp_path: Path) -> None:
    run = residua.run(model, [[5, 6, 7], [8, 9]], sites="resid_post.1", edits=[EDIT])
    run.save(tmp_path / "a.zarr")
    saved = run.save(s3.address("saved.zarr"), storage_options=s3.options)
    assert saved.place == s3.address("saved.zarr")
    assert objects(saved.place, s3.options) == files(tmp_path / "a.zarr")


def test_scores_of_heads_lie_beside_their_archive(model: PreTrainedModel, s3: S3Server, tmp_path: Path) -> None:
    repeats = RepeatSettings(period=7, copies=2, n_examples=3)
    scores = []
    for out in (tmp_path / "ind.zarr", s3.address("induction/ind.zarr")):
        made = capture_repeats(model, out=out, repeats=repeats, storage_options=s3.options)
        scores.append(score_repeats(made.archive, name="llama"))
    assert scores[0].scores.equals(scores[1].scores)
    assert (scores[0].folder, scores[1].folder) == (tmp_path / "ind-heads", s3.address("induction/ind-heads"))
    assert objects(str(scores[1].folder), s3.options) == files(tmp_path / "ind-heads")
