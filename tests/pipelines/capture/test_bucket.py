"""Captures straight into a bucket of a real S3 server: the archive is the one that a disk gets, byte for byte."""

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from obstore.store import from_url
from transformers import PreTrainedModel
from zarr.storage import ObjectStore

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import CaptureError, DatasetError, NotCapturedError, PlanError, StorageError
from residua.store.storage.lease import LEASE, leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.models.tiny import TINY
from tests.models.tiny_pairs import TINY_PAIRS
from tests.pipelines.small_capture import capture
from tests.servers.clouds import serving_cloud
from tests.servers.objects import files
from tests.servers.objects import objects as objects_at
from tests.servers.proxy import Fault, proxied
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.timeout(300)

SITES = "resid_post.*,q.1"
LOSSY = "attn_out.*,pattern.1"


def objects(server: S3Server, name: str) -> dict[str, bytes]:
    return objects_at(server.address(name), server.options)


class StoppedError(Exception):
    """Raised in the middle of a capture."""


def stop_after(n: int) -> Any:
    def on_batch(stats: Any) -> None:
        nonlocal n
        n -= 1
        if n < 0:
            raise StoppedError

    return on_batch


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, tokens: list[list[int]]) -> Path:
    path = tmp_path_factory.mktemp("disk") / "a.zarr"
    capture(TINY["llama"](), tokens, path, sites=SITES)
    return path


@pytest.mark.parametrize("options", [{"sites": SITES}, {"sites": LOSSY, "codec": "int8-block32"}], ids=["raw", "lossy"])
def test_a_bucket_gets_what_a_disk_gets(
    s3: S3Server, tmp_path: Path, llama: PreTrainedModel, tokens: list[list[int]], options: dict[str, Any]
) -> None:
    name = f"same-{len(options)}/a.zarr"  # a note has the last part
    disk = capture(llama, tokens, tmp_path / "a.zarr", **options)
    there = capture(llama, tokens, s3.address(name), storage_options=s3.options, **options)
    assert objects(s3, name) == files(tmp_path / "a.zarr")
    assert (there.archive.is_sealed, there.archive.place, there.resumed) == (True, s3.address(name), False)
    assert [note for note in there.notes if "eager" not in note] == [n for n in disk.notes if "eager" not in n]
    assert not verify(s3.address(name), storage_options=s3.options).problems
    again = capture(llama, tokens, s3.address(name), storage_options=s3.options, **options)
    assert (again.resumed, again.stats.rows) == (True, 0)
    store = ObjectStore(from_url(s3.address(name), client_options={"allow_http": True}, **s3.options), read_only=True)
    group = zarr.open_group(store, mode="r")
    stored = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert stored == {spec.path for spec in disk.archive.plan.arrays}
    assert np.array_equal(np.asarray(group["rows/token"]), np.concatenate(tokens))


@pytest.mark.parametrize(("scheme", "lag"), [("gs", 0), ("az", 0), ("gs", 7)])
def test_other_clouds_get_the_same(
    scheme: str, lag: int, on_disk: Path, llama: PreTrainedModel, tokens: list[list[int]]
) -> None:
    with serving_cloud(scheme) as cloud:
        cloud.lag = lag  # of lists
        address = cloud.address("a.zarr")
        with pytest.raises(StoppedError):
            capture(llama, tokens, address, storage_options=cloud.options, sites=SITES, on_batch=stop_after(6))
        capture(llama, tokens, address, storage_options=cloud.options, sites=SITES)
        assert {name: found.data for name, found in cloud.objects.items()} == {
            f"a.zarr/{name}": data for name, data in files(on_disk).items()
        }


def test_an_unfinished_archive_says_how_far_it_is_and_is_finished(
    s3: S3Server, on_disk: Path, llama: PreTrainedModel, tokens: list[list[int]]
) -> None:
    address = s3.address("unfinished.zarr")
    with pytest.raises(StoppedError):
        capture(llama, tokens, address, storage_options=s3.options, sites=SITES, on_batch=stop_after(6))
    archive = residua.open(address, storage_options=s3.options)
    rows, total, shards, _ = archive.progress
    assert total == 169
    assert 0 < rows < total
    assert not archive.is_sealed
    expected = residua.open(on_disk)
    first, stop = archive.captured_rows()[0]
    assert np.array_equal(archive["q.1"][first:stop], expected["q.1"][first:stop])
    assert archive.text(0) if archive.metadata.files.get("tokenizer/tokenizer.json") else True
    with pytest.raises(NotCapturedError):
        archive["q.1"][:]
    report = verify(address, storage_options=s3.options)
    assert report.is_sound
    assert any(f"{rows:,}" in note and f"{total:,}" in note for note in report.notes)
    with pytest.raises(NotCapturedError, match="not finished"):
        residua.pull(address, on_disk.parent / "pulled.zarr", storage_options=s3.options)
    with pytest.raises(PlanError, match="unfinished"):
        residua.push(on_disk, address, storage_options=s3.options)
    ended = capture(llama, tokens, address, storage_options=s3.options, sites=SITES)
    assert (ended.resumed, ended.stats.committed_rows) == (True, total - rows)
    assert objects(s3, "unfinished.zarr") == files(on_disk)
    assert shards > 0


def test_a_start_that_fails_leaves_nothing(s3: S3Server, llama: PreTrainedModel, tokens: list[list[int]]) -> None:
    with pytest.raises(StoppedError):
        capture(llama, tokens, s3.address("nothing"), storage_options=s3.options, sites=SITES, on_batch=stop_after(0))
    assert objects(s3, "nothing") == {}


def test_what_a_killed_start_left_is_taken_up(
    s3: S3Server, on_disk: Path, llama: PreTrainedModel, tokens: list[list[int]]
) -> None:
    """No root yet, a lease of a process that is gone, and files of another plan."""
    folder = ObjectFolder(s3.address("begun"), s3.options)
    with leased(folder):
        lease = folder.read(LEASE, 2**16).replace(b'"pid": ', b'"pid": 9')
    folder.write(LEASE, [lease])
    folder.write("examples/part-00007.parquet", [b"left"])
    folder.write("sites/mlp_out/1/zarr.json", [b"left"])
    capture(llama, tokens, folder.address, storage_options=s3.options, sites=SITES)
    found = objects(s3, "begun")
    assert {name: data for name, data in found.items() if "mlp_out" not in name} == files(on_disk)


def test_two_runs_and_other_plans_are_kept_apart(s3: S3Server, llama: PreTrainedModel, tokens: list[list[int]]) -> None:
    folder = ObjectFolder(s3.address("apart"), s3.options)
    with leased(folder), pytest.raises(ArchiveInUseError, match="apart"):
        capture(llama, tokens, folder.address, storage_options=s3.options, sites=SITES)
    capture(llama, tokens, folder.address, storage_options=s3.options, sites="final")
    with pytest.raises(PlanError, match="another plan"):
        capture(llama, tokens, folder.address, storage_options=s3.options, sites=SITES)
    with pytest.raises(PlanError, match="host_memory"):
        capture(llama, tokens, s3.address("memory"), storage_options=s3.options, sites="final", host_memory=10000)
    assert objects(s3, "memory") == {}


def test_faults_lose_nothing(s3: S3Server, on_disk: Path, llama: PreTrainedModel, tokens: list[list[int]]) -> None:
    dice = random.Random(11)
    faults: tuple[Fault, ...] = (500, 503, 503, "drop", "lost", "cut", "slow")

    def fault(method: str, _path: str) -> Fault | None:
        return dice.choice((*faults, 409) if method == "PUT" else faults) if dice.random() < 0.15 else None

    with proxied(s3.options["endpoint"]) as proxy:
        proxy.fault = fault
        quick = {"max_retries": 8, "backoff": {"init_backoff": timedelta(milliseconds=1)}}
        options = {**s3.options, "endpoint": proxy.url, "retry_config": quick}
        capture(llama, tokens, s3.address("faults"), storage_options=options, sites=SITES)
    assert objects(s3, "faults") == files(on_disk)


def test_an_upload_that_fails_reaches_the_caller(
    s3: S3Server, on_disk: Path, llama: PreTrainedModel, tokens: list[list[int]]
) -> None:
    with proxied(s3.options["endpoint"]) as proxy:
        proxy.fault = lambda method, path: 503 if method == "PUT" and "/q/1/c/4/" in path else None
        options = {**s3.options, "endpoint": proxy.url, "retry_config": {"max_retries": 0}}
        with pytest.raises(CaptureError, match=r"q/1/c/4.*503") as caught:
            capture(llama, tokens, s3.address("upload"), storage_options=options, sites=SITES)
    assert isinstance(caught.value.__cause__, StorageError)
    capture(llama, tokens, s3.address("upload"), storage_options=s3.options, sites=SITES)
    assert objects(s3, "upload") == files(on_disk)


@pytest.fixture
def recorded(llama: PreTrainedModel, tokens: list[list[int]]) -> Any:
    def record(out: Any, *, fail: bool = False, **options: Any) -> None:
        with residua.Recorder(llama, sites="resid_post.1", out=out, rows_per_shard=16, **options):
            for ids in tokens:
                llama(torch.tensor([ids]))
            if fail:
                raise StoppedError

    return record


def test_a_recorder_writes_to_a_bucket(s3: S3Server, tmp_path: Path, recorded: Any) -> None:
    recorded(tmp_path / "a.zarr")
    recorded(s3.address("recorded"), storage_options=s3.options)
    assert objects(s3, "recorded") == files(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="recorded"):
        recorded(s3.address("recorded"), storage_options=s3.options)
    with pytest.raises(StoppedError):
        recorded(s3.address("half"), storage_options=s3.options, fail=True)
    archive = residua.open(s3.address("half"), storage_options=s3.options)
    assert (archive.n_rows, archive.is_sealed) == (160, False)
    whole = residua.open(tmp_path / "a.zarr")
    assert np.array_equal(archive["resid_post.1"][:160], whole["resid_post.1"][:160])
    assert archive.example(3)["resid_post.1"].shape == whole.example(3)["resid_post.1"].shape
    assert verify(s3.address("half"), storage_options=s3.options).is_sound


def test_both_stacks_of_an_encoder_decoder(s3: S3Server, tmp_path: Path) -> None:
    model, pairs = (
        TINY_PAIRS["t5"](),
        [{"input_ids": [5, 6, 7], "labels": [8, 9, 2]}, {"input_ids": [3], "labels": [2]}],
    )
    settings: Any = {"sites": "resid_post.*,cross_k.*", "rows_per_shard": 4}
    capture(model, pairs, tmp_path / "pairs.zarr", **settings)

    def stop(stats: Any) -> None:
        raise StoppedError

    address, options = s3.address("pairs.zarr"), {"storage_options": s3.options}
    with pytest.raises(StoppedError):
        capture(model, pairs, address, **settings, **options, on_batch=stop)
    there = capture(model, pairs, address, **settings, **options)
    assert objects(s3, "pairs.zarr") == files(tmp_path / "pairs.zarr")
    assert tuple(there.archive.stacks) == ("encoder", "decoder")
    assert not verify(address, storage_options=s3.options).problems
    with pytest.raises(PlanError, match=r"pairs\.zarr was begun"):
        capture(model, pairs, address, **{**settings, "sites": "decoder.resid_post.*"}, **options)
    with pytest.raises(PlanError, match=r"s3://acts/pairs\.zarr"):
        capture(TINY["llama"](), [[5, 6]], address, sites="final", **options)
    with pytest.raises(DatasetError, match="target_column"):
        capture(model, [{"input_ids": [5]}], s3.address("refused.zarr"), **settings, **options)
    assert not objects(s3, "refused.zarr")


def provenance_of(archive: residua.Archive) -> dict[str, Any]:
    """Return how an archive was made, but not the digest of when and what it read."""
    found: Any = archive.provenance
    return {**found, "dataset": {**found["dataset"], "reading": ""}}


@pytest.mark.parametrize("keep", [False, True])
def test_paths_of_this_machine_are_shortened_as_in_a_copy(
    s3: S3Server, tmp_path: Path, llama: PreTrainedModel, keep: bool
) -> None:
    """By the same rule as `residua push`: model, data and command lose their folders, unless they are to be kept."""
    llama.save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n{"input_ids": [9, 10]}\n')
    words = f"residua capture --model {tmp_path}/model"
    found, name = [], f"paths-{keep}"
    for out in (tmp_path / "a.zarr", s3.address(name)):
        settings: Any = {"command": words, "sites": "final", "keep_paths": keep, "storage_options": s3.options}
        found.append(capture_dataset(str(tmp_path / "model"), str(tmp_path / "d.jsonl"), out=out, **settings))
    residua.push(tmp_path / "a.zarr", s3.address(f"{name}-pushed"), storage_options=s3.options, keep_paths=keep)
    here, there, pushed = (
        provenance_of(one)
        for one in (
            *(each.archive for each in found),
            residua.open(s3.address(f"{name}-pushed"), storage_options=s3.options),
        )
    )
    assert (str(tmp_path) in str(here), str(tmp_path) in str(there)) == (True, keep)
    assert there == pushed
    assert any(str(tmp_path) in note and "keep_paths" in note for note in found[1].notes) != keep
    again = capture_dataset(str(tmp_path / "model"), str(tmp_path / "d.jsonl"), out=s3.address(name), **settings)
    assert (again.resumed, again.stats.rows) == (True, 0)
