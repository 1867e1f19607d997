"""Commit records: complete, never replaced, every value checked, and every flipped bit noticed."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import residua
from residua.store.base.canonical import canonical_json, digest_of
from residua.store.base.errors import DamagedArchiveError
from residua.store.format.archive_metadata import read_metadata, write_metadata
from residua.store.format.commits import FOLDER, Commit, ShardFile, content_hash, publish_commit, read_commits
from tests.stopped import take_back
from tests.store.small_archive import make_archive

PLAN = "ab" * 32
FILE = ShardFile(n_bytes=100, digest="cd" * 32, n_nonfinite=2)
LOSSY = ShardFile(n_bytes=7, digest="ef" * 32, squares=3.5, error_squares=0.0)
COMMIT = Commit(
    plan=PLAN,
    shard=3,
    rows=(3072, 4096),
    arrays={"sites/resid_post/7": FILE, "sites/q/1": LOSSY},
    examples={"part-00001.parquet": "12" * 32},
)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
SQUARES = st.none() | st.floats(0, 1e300)
FILES = st.builds(
    ShardFile,
    n_bytes=st.integers(0, 2**40),
    digest=DIGESTS,
    n_nonfinite=st.integers(0, 2**40),
    squares=SQUARES,
    error_squares=SQUARES,
    chunks=st.binary(max_size=4).map(lambda part: part * 8),
)
COMMITS = st.builds(
    Commit,
    plan=st.just(PLAN),
    shard=st.integers(0, 2**40),
    rows=st.tuples(st.integers(0, 2**40), st.integers(1, 2**20)).map(lambda pair: (pair[0], sum(pair))),
    arrays=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), FILES, max_size=3),
    writer=st.integers(0, 9999),
)


def path_of(archive: Path, commit: Commit = COMMIT) -> Path:
    return archive / FOLDER / commit.name


def write_record(archive: Path, record: object, name: str = COMMIT.name) -> None:
    (archive / FOLDER).mkdir(exist_ok=True)
    text = canonical_json({"record": record, "sha256": digest_of(record)})
    (archive / FOLDER / name).write_bytes(text)


@settings(max_examples=30)
@given(commit=COMMITS)
def test_a_record_comes_back(commit: Commit, tmp_path_factory: pytest.TempPathFactory) -> None:
    archive = tmp_path_factory.mktemp("archive")
    publish_commit(archive, commit)
    assert read_commits(archive, PLAN) == {commit.shard: commit}
    assert [path.name for path in (archive / FOLDER).iterdir()] == [f"{commit.shard:08d}-{commit.writer:04d}.json"]


def test_without_records_there_is_nothing(tmp_path: Path) -> None:
    assert read_commits(tmp_path, PLAN) == {}
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / ".00000001-0000.json.7-00000000.tmp").write_text("{")
    (tmp_path / FOLDER / "٠٠٠٠٠٠٠١-0000.json").write_text("{")
    assert read_commits(tmp_path, PLAN) == {}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    publish_commit(tmp_path, replace(COMMIT, arrays={"q": LOSSY}))
    path = path_of(tmp_path)
    sound = path.read_bytes()
    unnoticed = []
    for at in range(len(sound) - 1):
        for bit in range(8):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << bit)]) + sound[at + 1 :])
            try:
                read_commits(tmp_path, PLAN)
            except DamagedArchiveError as error:
                assert str(path) in str(error)  # noqa: PT017  # every one of thousands must name the file
            else:
                unnoticed.append((at, bit))
    assert not unnoticed


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    publish_commit(tmp_path, COMMIT)
    path = path_of(tmp_path)
    sound = path.read_bytes()
    for length in range(len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(DamagedArchiveError, match=r"Delete it and run .*again"):
            read_commits(tmp_path, PLAN)


def test_a_record_is_never_replaced(tmp_path: Path) -> None:
    publish_commit(tmp_path, COMMIT)
    before = path_of(tmp_path).read_bytes()
    with pytest.raises(FileExistsError, match=COMMIT.name):
        publish_commit(tmp_path, replace(COMMIT, arrays={}))
    assert path_of(tmp_path).read_bytes() == before
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [COMMIT.name], "no temporary file stays"


def _publish(archive: Path, number: int, start: Any, outcomes: Any) -> None:
    """Publish ten shards, in the same order as the others, and report which were won."""
    won = []
    start.wait()
    for shard in range(10):
        try:
            publish_commit(archive, replace(COMMIT, shard=shard, arrays={str(number): FILE}))
            won.append(shard)
        except FileExistsError:
            continue
    outcomes.put((number, won))


def test_of_several_processes_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, outcomes = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_publish, args=(tmp_path, number, start, outcomes)) for number in range(3)]
    for worker in workers:
        worker.start()
    won = dict(outcomes.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sorted(shard for shards in won.values() for shard in shards) == list(range(10))
    for shard, commit in read_commits(tmp_path, PLAN).items():
        (winner,) = commit.arrays
        assert shard in won[int(winner)]


def test_a_record_of_another_plan_is_refused(tmp_path: Path) -> None:
    publish_commit(tmp_path, COMMIT)
    with pytest.raises(DamagedArchiveError, match=r"copied here from another archive") as caught:
        read_commits(tmp_path, "00" * 32)
    assert str(path_of(tmp_path)) in str(caught.value)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    publish_commit(tmp_path, COMMIT)
    path_of(tmp_path).rename(tmp_path / FOLDER / "00000004-0000.json")
    with pytest.raises(DamagedArchiveError, match=r"it is the record 00000003-0000\.json"):
        read_commits(tmp_path, PLAN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", "ab"),
        ("plan", None),
        ("plan", PLAN.upper()),
        ("shard", True),
        ("shard", -3),
        ("shard", 3.0),
        ("writer", "0"),
        ("rows", [4096, 3072]),
        ("rows", [5, 5]),
        ("rows", [-1, 4]),
        ("rows", [0, 2**80]),
        ("rows", [0, 1, 2]),
        ("rows", ["0", "1"]),
        ("rows", None),
        ("examples", {"../zarr.json": "12" * 32}),
        ("examples", {"part-00001.parquet": "12"}),
        ("examples", {"part-00001.parquet": None}),
        ("examples", []),
        ("arrays", {"sites/q/1": {}}),
        ("arrays", {"sites/q/1": {"n_bytes": -1, "digest": "cd" * 32}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "no"}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "squares": -1.0}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "squares": "1"}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "other": 1}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "chunks": "AAAA"}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "chunks": "?"}}),
        ("arrays", {"sites/q/1": {"n_bytes": 1, "digest": "cd" * 32, "chunks": 8}}),
        ("arrays", [[]]),
    ],
)
def test_a_record_with_a_right_digest_and_wrong_values_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write_record(tmp_path, {**COMMIT.to_json(), key: value})
    with pytest.raises(DamagedArchiveError, match=COMMIT.name):
        read_commits(tmp_path, PLAN)


@settings(max_examples=150)
@given(text=st.binary(max_size=80) | st.sampled_from([b"[" * 10**5, b'{"record":' * 10**4, b"9" * 5000, b'"\\ud800"']))
def test_other_bytes_are_refused(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    archive = tmp_path_factory.mktemp("archive")
    (archive / FOLDER).mkdir()
    path_of(archive).write_bytes(text)
    with pytest.raises(DamagedArchiveError, match=COMMIT.name):
        read_commits(archive, PLAN)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    (tmp_path / FOLDER).mkdir()
    make(path_of(tmp_path))
    with pytest.raises(DamagedArchiveError, match="it is not a file"):
        read_commits(tmp_path, PLAN)


def test_absent_values_are_left_out() -> None:
    assert FILE.to_json() == {"n_bytes": 100, "digest": "cd" * 32, "n_nonfinite": 2}
    assert ShardFile(n_bytes=1, digest="ab" * 32).to_json() == {"n_bytes": 1, "digest": "ab" * 32}
    bare = Commit(plan=PLAN, shard=0, rows=(0, 1), arrays={})
    assert bare.to_json() == {"plan": PLAN, "shard": 0, "rows": [0, 1], "arrays": {}}
    assert json.loads(canonical_json(LOSSY.to_json()))["error_squares"] == 0.0


def test_an_overlay_that_is_written_to_has_another_hash(tmp_path: Path) -> None:
    archive = residua.open(make_archive(tmp_path / "a.zarr"))
    site = archive.sites[0]
    overlay = residua.overlay(archive, tmp_path / "o")
    before = content_hash(tmp_path / "o")
    rows = np.zeros((1, *archive[site].shape[1:]), np.float32)
    overlay.write(site, [0], rows)
    once = content_hash(tmp_path / "o")
    overlay.write(site, [0], rows + 1)
    assert len({before, once, content_hash(tmp_path / "o")}) == 3


def test_a_checkpoint_that_is_trained_again_has_another_hash(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")  # not above: the other tests need none, and start processes
    hashes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save({"0.weight": torch.randn(400, 400)}, tmp_path / "params.pt")
        hashes.add(content_hash(tmp_path))
    assert len(hashes) == 2


def test_the_hash_of_an_archive_covers_its_metadata_and_commits(tmp_path: Path) -> None:
    make_archive(tmp_path / "a.zarr")
    before = content_hash(tmp_path / "a.zarr")
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert content_hash(tmp_path / "b.zarr") == before
    take_back(tmp_path / "b.zarr")  # records count where no index is
    hashes = {before, content_hash(tmp_path / "b.zarr")}
    take_back(tmp_path / "b.zarr", 1)
    hashes.add(content_hash(tmp_path / "b.zarr"))
    assert len(hashes) == 3
    shutil.rmtree(tmp_path / "a.zarr" / "commits")
    assert content_hash(tmp_path / "a.zarr") == before
    write_metadata(tmp_path / "a.zarr", replace(read_metadata(tmp_path / "a.zarr"), provenance={"other": 1}))
    assert content_hash(tmp_path / "a.zarr") != before


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "commits").mkdir()
    with pytest.raises(FileNotFoundError, match=r"zarr\.json"):
        content_hash(tmp_path)
