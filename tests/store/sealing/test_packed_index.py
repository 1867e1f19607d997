"""The packed index: it says what the records say, opening reads it in parts, and what is forged is refused."""

import builtins
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import residua
from residua.store.base.errors import (
    DamagedArchiveError,
    NotCapturedError,
    PlanError,
    ResiduaError,
    UnsafeArchiveError,
)
from residua.store.encoding.shard import shard_digest, shard_path
from residua.store.format.archive_metadata import read_metadata, write_metadata
from residua.store.format.array_metadata import open_array
from residua.store.format.commits import read_commits, same_files
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.sealing.losses import losses_of
from residua.store.sealing.packed_index import HEADER, INDEX, LOSS, TOTALS, PackedIndex, file_totals
from residua.store.sealing.seal import pack, relative_error, seal
from residua.store.storage.lease import leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.servers.objects import files, objects
from tests.servers.s3 import S3Server
from tests.store.forging import refused, sign_index, without_index
from tests.store.small_archive import N_ROWS, N_SHARDS, make_archive, read_everything

CODECS = ("raw", "fast", "int8-block32", "bitround10")
FROZEN = sorted((Path(__file__).parents[2] / "fixtures" / "format-1.0").glob("*.archive"))


def index_of(archive: Path) -> PackedIndex:
    commits = Archive(archive).commits
    assert isinstance(commits, PackedIndex)
    return commits


@pytest.mark.parametrize("open_size", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_the_index_says_what_the_records_say(codec: str, open_size: bool, tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr", codec, open_size=open_size, nonfinite=True)
    index, plan = index_of(path), Archive(path).plan
    records = read_commits(path, plan.digest)
    assert {shard: replace(index[shard], examples={}) for shard in index} == records
    for key in plan.file_keys:
        assert file_totals(index, key) == file_totals(records, key)
        assert index.file_bytes(key).tolist() == [records[shard].arrays[key].n_bytes for shard in records]
    for site in plan.sites:
        assert losses_of(site, index) == losses_of(site, records)
        assert losses_of(site, index).n_nonfinite > 0
        assert relative_error(site, index) == relative_error(site, records)
        spec = site.arrays(plan.rows_per_shard)[0]
        found = open_array(path, spec.path)[2].get("relative_rms_error")
        assert found == (relative_error(site, records) if codec in ("int8-block32", "bitround10") else None)
    for shard in index:
        for spec in plan.arrays:
            assert shard_digest(index.chunk_table(spec.key, shard), spec) == records[shard].arrays[spec.key].digest


def reads_of(read: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the files that `read` opens, by their names."""
    opened: list[str] = []
    plain, low = builtins.open, os.open

    def note(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return plain(path, *args, **kwargs)

    def note_low(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return low(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("io.open", note)
        patch.setattr(builtins, "open", note)
        patch.setattr(os, "open", note_low)
        read()
    return [Path(name).name for name in opened]


def test_opening_reads_two_files_and_no_record(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        archive = Archive(untouched)
        assert archive.is_sealed
        assert archive.captured_rows()[-1][1] == archive.n_rows == N_ROWS
        assert archive.progress.total_shards == N_SHARDS
        assert "sealed" in repr(archive)

    assert reads_of(use, monkeypatch) == ["zarr.json", INDEX]
    assert reads_of(lambda: summarise(Archive(untouched)), monkeypatch)[:2] == ["zarr.json", INDEX]


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_an_archive_of_format_1_0_can_be_packed(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "a.zarr"))
    before = {site: Archive(copy)[site].bits() for site in Archive(copy).sites}
    steps: list[tuple[int, int]] = []
    pack(copy, on_shard=lambda *step: steps.append(step))
    index = index_of(copy)
    assert steps[-1] == (len(index), len(index))
    assert all(same_files(index[shard], old) for shard, old in Archive(path).commits.items())
    assert all(np.array_equal(Archive(copy)[site].bits(), bits) for site, bits in before.items())
    report = verify(copy)
    assert (report.problems, report.notes) == ([], [])
    array: Any = zarr.open_array(copy / "rows/token", mode="r")
    assert array.metadata.dimension_names == ("row",)
    packed = (copy / INDEX).read_bytes()
    pack(copy)
    assert (copy / INDEX).read_bytes() == packed


def send(path: Path, server: S3Server, name: str) -> ObjectFolder:
    """Put an archive into a bucket as any tool does."""
    folder = ObjectFolder(server.address(name), server.options)
    for each, data in files(path).items():
        folder.write(each, [data])
    return folder


@pytest.mark.parametrize(
    "path", [path for path in FROZEN if path.stem in ("raw", "int8-block32")], ids=lambda it: it.stem
)
def test_an_archive_of_format_1_0_can_be_packed_in_a_bucket(path: Path, tmp_path: Path, s3: S3Server) -> None:
    here = Path(shutil.copytree(path, tmp_path / "a.zarr"))
    pack(here)
    folder = send(path, s3, f"packed-{path.stem}")
    steps: list[tuple[int, int]] = []
    pack(folder.address, storage_options=s3.options, on_shard=lambda *step: steps.append(step))
    assert objects(folder.address, s3.options) == files(here)
    there = residua.open(folder.address, storage_options=s3.options)
    assert steps[-1] == (len(there.commits), len(there.commits))
    assert all(np.array_equal(there[site].bits(), Archive(path)[site].bits()) for site in there.sites)
    pack(there)
    assert objects(folder.address, s3.options) == files(here)


def test_packing_in_a_bucket_refuses_what_it_refuses_in_a_folder(tmp_path: Path, s3: S3Server) -> None:
    folder = send(make_archive(tmp_path / "a.zarr"), s3, "refused")
    kept = objects(folder.address, s3.options)
    damaged = "sites/q/1/c/2/0/0"
    for name, content, words in (
        ("commits/00000001-0000.json", None, r"s3://acts/refused/commits/00000001-0000\.json"),
        ("commits/00000001-0000.json", b"{}", r"s3://acts/refused/commits/00000001-0000\.json.*damaged"),
        (damaged, kept[damaged][:-1], f"s3://acts/refused/{damaged} has"),
        (damaged, None, f"s3://acts/refused/{damaged} is missing"),
    ):
        folder.delete([name]) if content is None else folder.write(name, [content])
        with pytest.raises(DamagedArchiveError, match=words):
            pack(folder.address, storage_options=s3.options)
        folder.write(name, [kept[name]])
    assert objects(folder.address, s3.options) == kept
    with pytest.raises(FileNotFoundError, match="s3://acts/none is not an archive"):
        pack(s3.address("none"), storage_options=s3.options)
    with pytest.raises(PlanError, match="only read from: download"):
        pack("http://127.0.0.1:9/a.zarr")
    with leased(folder), pytest.raises(ArchiveInUseError, match="refused"):
        pack(folder.address, storage_options=s3.options)


def test_packing_refuses_what_is_not_finished_or_not_sound(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr")
    write_metadata(path, replace(read_metadata(path), sealed=None))
    (path / "commits/00000001-0000.json").rename(tmp_path / "kept")
    with pytest.raises(DamagedArchiveError, match=r"commits/00000001-0000\.json"):
        pack(path)
    (tmp_path / "kept").rename(path / "commits/00000001-0000.json")
    file = path / "sites/q/1/c/2/0/0"
    content = file.read_bytes()
    for damaged in (content[:-1], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(DamagedArchiveError, match=str(file)):
            pack(path)
    assert read_metadata(path).index is None
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "none")
    growing = make_archive(tmp_path / "g.zarr", open_size=True)
    write_metadata(growing, replace(read_metadata(growing), sealed=None))
    with pytest.raises(NotCapturedError, match="not finished"):
        pack(growing)


@pytest.mark.parametrize("stop", ["index", "consolidated", "root"])
def test_a_crash_while_sealing_leaves_an_archive_that_is_sealed_again(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_archive(tmp_path / "a.zarr")
    expected = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    everything = read_everything(path)
    write_metadata(path, replace(read_metadata(path), sealed=None))
    (path / INDEX).unlink()

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place = {"index": "write_file", "consolidated": "consolidate", "root": "write_metadata"}[stop]
    with monkeypatch.context() as patch:
        patch.setattr(f"residua.store.sealing.seal.{place}", crash)
        with pytest.raises(KeyboardInterrupt):
            seal(path, read_metadata(path))
    assert not Archive(path).was_finished
    assert read_everything(path) == everything
    assert verify(path).is_sound
    seal(path, read_metadata(path))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == expected


def test_an_archive_opens_without_records_and_without_index(copy: Path) -> None:
    before = read_everything(copy)
    shutil.copytree(copy, copy.with_name("b.zarr"))
    shutil.rmtree(copy / "commits")
    assert read_everything(copy) == before
    assert verify(copy).is_sound
    other = copy.with_name("b.zarr")
    (other / INDEX).unlink()
    assert read_everything(other) == before
    assert "residua pack" in verify(other).problems[0].what
    shutil.rmtree(other / "commits")
    assert INDEX in refused(lambda: Archive(other).is_sealed)


def test_a_record_that_differs_from_the_index_is_named(copy: Path) -> None:
    name = "commits/00000001-0000.json"
    for content in (b"{}", (copy / "commits/00000002-0000.json").read_bytes()):
        (copy / name).write_bytes(content)
        assert [problem.path for problem in verify(copy).problems] == [name]


def head_with(head: bytes, **changes: Any) -> bytes:
    names = ("magic", "page_bytes", "n_files", "n_shards", "n_rows", "n_losses", "plan")
    values = dict(zip(names, HEADER.unpack_from(head), strict=True)) | changes
    return HEADER.pack(*values.values()) + head[HEADER.size :]


FIELDS: list[dict[str, Any]] = [
    {"magic": b"RESIDUA\x02"},
    {"page_bytes": 0},
    {"page_bytes": 1},
    {"page_bytes": 2**32 - 1},
    {"n_files": 0},
    {"n_files": 2**32 - 1},
    {"n_shards": 2**64 - 1},
    {"n_rows": 2**63},
    {"n_losses": 1},
    {"n_losses": 2**64 - 1},
    {"plan": bytes(32)},
]


@pytest.mark.parametrize("change", FIELDS, ids=str)
def test_a_forged_head_is_refused(change: dict[str, Any], copy: Path) -> None:
    head, body = split(copy)
    sign_index(copy, head_with(head, **change), body, pages=False)
    assert str(copy / INDEX) in refused(lambda: Archive(copy)["q.1"][0])
    assert verify(copy).problems


def split(archive: Path) -> tuple[bytes, bytes]:
    content, entry = (archive / INDEX).read_bytes(), read_metadata(archive).index
    assert entry is not None
    at = int(str(entry["head_bytes"]))
    return content[:at], content[at:]


@pytest.mark.parametrize("field", TOTALS.names or ())
def test_forged_sums_are_bounded(field: str, copy: Path) -> None:
    head, body = split(copy)
    totals = np.frombuffer(head, TOTALS, offset=HEADER.size, count=5).copy()
    totals[0][field] = -1.0 if "squares" in field else 2**64 - 1
    sign_index(copy, head[: HEADER.size] + totals.tobytes() + head[HEADER.size + totals.nbytes :], body)
    try:
        summarise(Archive(copy))
    except ResiduaError as error:
        assert INDEX in str(error)  # noqa: PT017  # huge sums of integers may be shown, and do no harm
    else:
        assert "squares" not in field


@pytest.mark.parametrize("chunk", [(0, 0), (4, 0), (2**32 - 1, 0), (2**31, 7)])
def test_forged_chunks_are_refused_where_they_are_used(chunk: tuple[int, int], copy: Path) -> None:
    head, body = split(copy)
    sign_index(copy, head, struct.pack("<II", *chunk) + body[8:])
    index = index_of(copy)
    with pytest.raises(UnsafeArchiveError, match=f"{INDEX}: shard 0"):
        index[0]
    assert {"commits/00000000-0000.json", INDEX} == {problem.path for problem in verify(copy).problems}


@pytest.mark.parametrize("shards", [[1, 0], [1, 1], [0, 2**60]])
def test_forged_losses_are_refused(shards: list[int], tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr", nonfinite=True)
    head, body = split(path)
    losses = np.frombuffer(body[-LOSS.itemsize * 6 :], LOSS).copy()
    key = "sites/resid_post/0"
    losses["shard"][: len(shards)] = shards
    sign_index(path, head, body[: -losses.nbytes] + losses.tobytes())
    with pytest.raises(UnsafeArchiveError, match="order of shards"):
        index_of(path).losses(key)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        [],
        {"n_bytes": 1, "head_bytes": 1},
        {"n_bytes": -1, "head_bytes": 1, "sha256": ""},
        {"n_bytes": 2**60, "head_bytes": 2**60, "sha256": ""},
        {"n_bytes": 2**40, "head_bytes": 2**40, "sha256": ""},
        {"n_bytes": True, "head_bytes": 1, "sha256": ""},
        {"n_bytes": 1, "head_bytes": 1, "sha256": None},
        {"n_bytes": 0, "head_bytes": 0, "sha256": ""},
    ],
)
def test_a_forged_entry_is_refused(entry: Any, copy: Path) -> None:
    write_metadata(copy, replace(read_metadata(copy), index=entry))
    assert str(copy) in refused(lambda: Archive(copy)["q.1"][0])


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1), mask=st.integers(1, 255), cut=st.booleans())
def test_any_change_of_the_index_is_found(untouched: Path, at: float, mask: int, cut: bool) -> None:
    content = (untouched / INDEX).read_bytes()
    place = int(at * (len(content) - 1))
    changed = content[:place] if cut else content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
    try:
        (untouched / INDEX).write_bytes(changed)
        assert [problem.path for problem in verify(untouched).problems if INDEX in f"{problem}"]
    finally:
        (untouched / INDEX).write_bytes(content)


def test_pages_of_any_size_are_read(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr", "int8-block32", nonfinite=True)
    expected = {shard: index_of(path)[shard] for shard in range(N_SHARDS)}
    for page_bytes in (8, 24, 4096):
        seal(path, replace(read_metadata(path), index=None), page_bytes=page_bytes)
        assert HEADER.unpack_from((path / INDEX).read_bytes())[1] == page_bytes
        assert {shard: index_of(path)[shard] for shard in range(N_SHARDS)} == expected
        assert verify(path).problems == []
    pack(path)  # in place of the index that is there
    assert {shard: index_of(path)[shard] for shard in range(N_SHARDS)} == expected
    assert verify(path).problems == []


def test_sealing_keeps_what_others_wrote_and_the_digests_that_are_known(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "a.zarr", open_size=True)
    metadata = read_metadata(path)
    write_metadata(path, replace(metadata, sealed=None))
    for node, value in (("", "root"), ("rows", "group"), ("sites/q/1", "array")):
        zarr.open(path / node, mode="r+").attrs["mine"] = value
    (path / "head/head.json").write_bytes(b"damaged since")
    seal(path, read_metadata(path), metadata.sealed)
    assert [zarr.open(path / node, mode="r").attrs["mine"] for node in ("", "rows", "sites/q/1")] == [
        "root",
        "group",
        "array",
    ]
    assert zarr.open_consolidated(path)["sites/q/1"].attrs["mine"] == "array"
    assert read_metadata(path).files == metadata.files
    assert {problem.path for problem in verify(path).problems} == {"head/head.json"}
    without_index(path)
    with pytest.raises(TypeError, match="n_rows"):
        seal(path, replace(read_metadata(path), sealed=None), {"n_rows": "11"})


def test_the_shards_of_the_index_are_those_of_the_files(untouched: Path) -> None:
    index, plan = index_of(untouched), residua.open(untouched).plan
    for spec in plan.arrays:
        for shard in index:
            assert index.file(spec.key, shard).n_bytes == shard_path(untouched, spec, shard).stat().st_size
    assert list(index) == list(range(N_SHARDS))
    assert -1 not in index
    assert N_SHARDS not in index
    with pytest.raises(KeyError):
        index[N_SHARDS]
