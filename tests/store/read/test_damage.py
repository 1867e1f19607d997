"""Damage of every kind to every file is reported, and no reader gets a wrong number."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from residua.store.base.canonical import canonical_json, digest_of
from residua.store.base.errors import DamagedArchiveError, NotCapturedError, ResiduaError
from residua.store.encoding.shard import check_shard
from residua.store.format.archive_metadata import read_metadata, write_metadata
from residua.store.format.array_metadata import open_array, resize_array
from residua.store.format.commits import read_commits
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.sealing.lost_shards import drop_lost
from residua.store.storage.files import sweep
from residua.store.verification.report import Verification
from residua.store.verification.verify import verify
from tests.store.forging import without_index
from tests.store.samples import flip_every_bit
from tests.store.small_archive import HEIGHT, N_ROWS, N_SHARDS, files_of, is_same_json, make_archive, read_everything

PRESETS = ("raw", "fast", "small", "int8-block32", "bitround10")
FLIPS = 4


@pytest.fixture(scope="module", params=PRESETS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp(request.param) / "a.zarr", request.param)


def files_to_damage(sound: Path) -> list[str]:
    """Return all files of one archive, and of the others those that another codec makes another way."""
    is_first = sound.parent.name.startswith(PRESETS[0])
    return [name for name in files_of(sound) if is_first or name.startswith("sites/")]


def names(report: Verification, name: str) -> bool:
    """Say whether a problem of the report names the file."""
    return any(name in f"{problem.path} {problem.what}" for problem in report.problems)


def check_reading(archive: Path, before: dict[str, object], name: str) -> int:
    """Check that all that can be read is as before or an error; return how many errors there are."""
    errors = 0
    left_out = {"progress"} if name.startswith("commits") else set()
    for what, value in read_everything(archive).items():
        if isinstance(value, Exception):
            errors += 1
            assert str(archive) in str(value) or isinstance(value, NotCapturedError), value
        elif what not in left_out:
            assert value == before[what], f"{what} changed silently when {name} was damaged"
    return errors


def test_the_sound_archive_is_sound(sound: Path) -> None:
    report = verify(sound)
    assert (report.problems, report.notes) == ([], [])
    assert not [value for value in read_everything(sound).values() if isinstance(value, Exception)]


def test_each_file_deleted_in_turn_is_named(sound: Path, tmp_path: Path) -> None:
    before = read_everything(sound)
    archive = Path(shutil.copytree(sound, tmp_path / "a.zarr"))
    for name in files_to_damage(sound):
        (archive / name).unlink()
        check_reading(archive, before, name)
        if name == "zarr.json":
            with pytest.raises(FileNotFoundError, match=r"has no zarr\.json"):
                verify(archive)
        elif name == "commits.index":
            assert names(verify(archive), name)
        elif name.startswith("commits/"):
            report = verify(archive)
            assert report.is_sound, "the index says what the record said"
            assert "1 of 3 records are missing" in "".join(report.notes)
        else:
            assert names(verify(archive), name), name
        shutil.copy(sound / name, archive / name)


def test_flipped_bits_in_every_file_are_found(sound: Path, tmp_path: Path) -> None:
    before = read_everything(sound)
    archive = Path(shutil.copytree(sound, tmp_path / "a.zarr"))
    chosen = random.Random(sound.parent.name)
    for name in files_to_damage(sound):
        data = (sound / name).read_bytes()
        for bit in chosen.sample(range(8 * len(data)), FLIPS):
            damaged = flipped(data, bit)
            (archive / name).write_bytes(damaged)
            check_reading(archive, before, name)
            assert names(verify(archive), name) or is_same_json(data, damaged), f"bit {bit} of {name}"
        (archive / name).write_bytes(data)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def outcome(read: Callable[[], object]) -> object:
    """Return what `read` returns, or our error."""
    try:
        return read()
    except ResiduaError as error:
        return error


@pytest.mark.parametrize("name", ["zarr.json", "sites/resid_post/0/zarr.json", "commits/00000001-0000.json"])
def test_every_single_bit_of_the_metadata_counts(copy: Path, name: str) -> None:
    without_index(copy)
    readers: dict[str, Callable[[], object]] = {
        "zarr.json": partial(read_metadata, copy),
        "sites/resid_post/0/zarr.json": partial(open_array, copy, "sites/resid_post/0"),
        "commits/00000001-0000.json": partial(read_commits, copy, Archive(copy).plan.digest),
    }
    sound, data = readers[name](), (copy / name).read_bytes()
    for bit in flip_every_bit(copy / name):
        found = outcome(readers[name])
        if isinstance(found, ResiduaError):
            assert name in str(found)
        else:
            assert found == sound
            assert is_same_json(data, flipped(data, bit)), f"{name} was read although it is {flipped(data, bit)!r}"


def test_bits_of_a_groups_metadata_count(copy: Path) -> None:
    name = "sites/q/zarr.json"
    sound = (copy / name).read_bytes()
    without_index(copy)
    shutil.rmtree(copy / "examples")  # what else is wrong does not matter here, and costs time
    for record in (copy / "commits").iterdir():
        record.unlink()
    for bit in [*range(0, 800, 3), *range(800, 8 * len(sound), 37)]:
        (copy / name).write_bytes(damaged := flipped(sound, bit))
        assert names(verify(copy), name) or is_same_json(sound, damaged), damaged


@pytest.mark.parametrize("codec", ["raw", "fast"])
def test_every_single_bit_of_a_shard_counts(codec: str, tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "a.zarr", codec))
    (spec,) = archive.plan.site("q.1").arrays(HEIGHT)
    path = tmp_path / "a.zarr/sites/q/1/c/2/0/0"
    for _ in flip_every_bit(path):
        assert str(path) in str(outcome(partial(check_shard, path, spec, N_ROWS - 2 * HEIGHT)))


@pytest.mark.parametrize("kept", [0, 1, 20, -1, -20])
def test_a_shard_cut_short_is_named(kept: int, copy: Path, untouched: Path) -> None:
    name = "sites/resid_post/0/c/1/0"
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:kept])
    assert names(verify(copy), name)
    assert check_reading(copy, read_everything(untouched), name) > 0


@pytest.mark.parametrize("more", [b"\0", b"x" * 100])
def test_a_shard_that_grew_is_named(more: bytes, copy: Path, untouched: Path) -> None:
    name = "sites/resid_post/0/c/1/0"
    (copy / name).write_bytes((copy / name).read_bytes() + more)
    assert names(verify(copy), name)
    assert check_reading(copy, read_everything(untouched), name) > 0


@pytest.mark.parametrize("name", ["notes.txt", "sites/q/1/readme", "head/weights.pt", "commits/README", "examples/x"])
def test_an_unknown_file_is_named_and_changes_nothing(name: str, copy: Path, untouched: Path) -> None:
    (copy / name).write_text("mine")
    report = verify(copy)
    assert report.is_sound
    assert any(name in note for note in report.notes)
    assert check_reading(copy, read_everything(untouched), name) == 0


def test_swapped_shards_are_named(copy: Path) -> None:
    first, second = (copy / f"sites/resid_post/0/c/{shard}/0" for shard in (0, 1))
    swapped = second.read_bytes(), first.read_bytes()
    first.write_bytes(swapped[0])
    second.write_bytes(swapped[1])
    report = verify(copy)
    assert names(report, "sites/resid_post/0/c/0/0")
    assert names(report, "sites/resid_post/0/c/1/0")
    assert all("not the one that was committed" in problem.what for problem in report.problems)


def test_a_shard_of_another_archive_is_named(copy: Path, tmp_path: Path) -> None:
    other = make_archive(tmp_path / "other.zarr", seed=1)
    for column in ("token", "position", "example"):
        shutil.copy(other / f"rows/{column}/c/0", copy / f"rows/{column}/c/0")
    assert names(verify(copy), "rows/token/c/0")


def test_a_commit_of_another_archive_is_refused(copy: Path, tmp_path: Path) -> None:
    other = make_archive(tmp_path / "other.zarr", seed=1)
    name = "commits/00000001-0000.json"
    shutil.copy(other / name, copy / name)
    assert names(verify(copy), name)
    without_index(copy)
    report = verify(copy)
    assert names(report, name)
    assert "copied here from another archive" in report.problems[0].what
    with pytest.raises(ResiduaError, match="copied here"):
        Archive(copy)["q.1"][...]


def test_a_commit_under_another_shards_name_is_refused(copy: Path) -> None:
    shutil.copy(copy / "commits/00000000-0000.json", copy / "commits/00000001-0000.json")
    assert names(verify(copy), "commits/00000001-0000.json")


def test_a_commit_past_the_end_is_named(copy: Path) -> None:
    path = copy / f"commits/{N_SHARDS:08d}-0000.json"
    record = json.loads((copy / "commits/00000001-0000.json").read_bytes())["record"]
    record["shard"] = N_SHARDS
    path.write_bytes(canonical_json({"record": record, "sha256": digest_of(record)}))
    assert names(verify(copy), path.name)


@pytest.mark.parametrize("change", ["rows", "arrays", "past the end"])
def test_a_record_that_is_not_of_the_plan_is_refused_when_it_is_read(change: str, copy: Path) -> None:
    without_index(copy)
    path = copy / "commits/00000002-0000.json"
    record = json.loads(path.read_bytes())["record"]
    path.unlink()
    if change == "rows":
        record["rows"][1] += 1
    elif change == "arrays":
        del record["arrays"]["sites/q/1"]
    else:
        record["shard"] = N_SHARDS
        path = copy / f"commits/{N_SHARDS:08d}-0000.json"
    path.write_bytes(canonical_json({"record": record, "sha256": digest_of(record)}))
    archive = Archive(copy)
    for read in (lambda: archive.is_sealed, lambda: summarise(archive), lambda: archive["q.1"][0]):
        with pytest.raises(DamagedArchiveError, match=f"{path.name}: .*record"):
            read()


def test_metadata_that_claim_too_many_rows_give_a_short_list(tmp_path: Path) -> None:
    copy = make_archive(tmp_path / "a.zarr", open_size=True)
    assert verify(copy).problems == []
    without_index(copy)
    metadata = read_metadata(copy)
    write_metadata(copy, replace(metadata, sealed={**(metadata.sealed or {}), "n_rows": 2**48 - 1}))
    assert "rows, the archive" in verify(copy).problems[0].what, "arrays of another size betray the lie"
    for spec in metadata.plan.arrays:
        resize_array(copy, spec, 2**48 - 1)
    for name in files_of(copy / "commits"):
        (copy / "commits" / name).unlink()
    missing = [problem for problem in verify(copy).problems if "missing" in problem.what]
    assert len(missing) == 9
    assert missing[-1].what.startswith(f"{2**48 // HEIGHT - 8:,} more records are missing")


@pytest.mark.parametrize("codec", ["raw", "fast"])
def test_records_whose_files_are_missing_or_of_another_size_are_dropped(codec: str, tmp_path: Path) -> None:
    copy = make_archive(tmp_path / "a.zarr", codec)
    assert drop_lost(copy, read_metadata(copy)) == []
    missing, short = copy / "sites/q/1/c/2/0/0", copy / "rows/token/c/0"
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    shutil.copy(copy / "commits/00000002-0000.json", copy / "commits/00000002-0001.json")
    sentences = drop_lost(copy, read_metadata(copy))
    assert [str(path) in sentence for path, sentence in zip((short, missing), sentences, strict=True)] == [True, True]
    assert files_of(copy / "commits") == ["00000001-0000.json"]
    again = Archive(copy)
    assert (again.progress.shards, again.is_sealed) == (1, False)
    assert drop_lost(copy, read_metadata(copy)) == []
    assert read_metadata(copy).index is None, "the records alone count until all shards are there again"


def test_a_damaged_shard_says_how_to_restore_it(copy: Path) -> None:
    path = copy / "sites/q/1/c/1/0/0"
    damaged = flipped(path.read_bytes(), 100)
    for change in (lambda: path.write_bytes(damaged), lambda: path.write_bytes(damaged[:50]), path.unlink):
        change()
        with pytest.raises(DamagedArchiveError, match=r"delete the shard's record commits/N+-\*\.json and run"):
            Archive(copy)["q.1"][...]
        assert names(verify(copy), "delete the shard's record commits/")


def test_two_writers_records_of_one_shard_that_differ_are_named(copy: Path) -> None:
    record = json.loads((copy / "commits/00000001-0000.json").read_bytes())["record"]
    record["writer"] = 1
    record["arrays"]["sites/q/1"]["digest"] = "0" * 64
    without_index(copy)
    path = copy / "commits/00000001-0001.json"
    path.write_bytes(canonical_json({"record": record, "sha256": digest_of(record)}))
    assert verify(copy).problems


def test_a_temporary_file_of_a_killed_writer_is_noted_and_removed(copy: Path, untouched: Path) -> None:
    name = "sites/q/1/c/1/0/.0.4194999-0123abcd.tmp"
    (copy / name).write_bytes(b"half a sh")
    report = verify(copy)
    assert report.problems == []
    assert any(name in note for note in report.notes)
    assert check_reading(copy, read_everything(untouched), name) == 0
    assert sweep(copy) == [copy / name]
    assert files_of(copy) == files_of(untouched)
