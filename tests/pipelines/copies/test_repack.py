"""An archive in larger shards has the same stored values, in fewer files, and can be run again as before."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import residua
from residua.pipelines.capture.captured_batches import captured_groups, schedule_of
from residua.pipelines.cli.main import main
from residua.pipelines.copies.repack import repack
from residua.store.base.errors import DamagedArchiveError, PlanError
from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.plain_zarr import plain_array
from tests.ragged import MODEL, write_dataset
from tests.store.small_archive import N_ROWS, make_archive

FROZEN = Path(__file__).parents[2] / "fixtures/format-1.0"
CODECS = ["raw", "fast", "small", "bitround7", "int8-block32"]


def stored(archive: Archive) -> dict[str, bytes]:
    """Return the stored elements of every array, which another Zarr reader reads."""
    return {spec.path: np.asarray(plain_array(archive.path, spec.path)[:]).tobytes() for spec in archive.arrays}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shard_bytes", [40 * 4 * 32, 2**30])
def test_stored_values_stay(codec: str, shard_bytes: int, tmp_path: Path) -> None:
    source = Archive(make_archive(tmp_path / "a.zarr", codec=codec, nonfinite=True))
    steps: list[tuple[int, int]] = []
    made = repack(source, tmp_path / "b.zarr", shard_bytes=shard_bytes, on_row=lambda *step: steps.append(step))
    assert stored(made) == stored(source)
    assert made.plan.rows_per_shard > source.plan.rows_per_shard
    assert len(made.commits) == len(steps) < len(source.commits)
    assert steps[-1] == (N_ROWS, N_ROWS)
    assert verify(made.path).problems == []
    assert made.examples.equals(source.examples)
    before, after = (residua.store.read.summary.summarise(archive) for archive in (source, made))
    for one, other in zip(before.sites, after.sites, strict=True):
        assert (one.n_nonfinite, one.n_spoiled) == (other.n_nonfinite, other.n_spoiled)
        assert one.relative_rms_error == other.relative_rms_error


@pytest.mark.parametrize("name", ["fast.archive", "int8-block32.archive"])
def test_archives_of_format_1_0(name: str, tmp_path: Path) -> None:
    source = Archive(FROZEN / name)
    made = repack(source, tmp_path / "b.zarr")
    assert verify(made.path).problems == []
    for site in source.sites:
        assert np.array_equal(made[site][:], source[site][:], equal_nan=True)


def test_side_tables_go_along(tmp_path: Path) -> None:
    source = Archive(make_archive(tmp_path / "a.zarr"))
    source.annotate({"example": [2], "mark": [0.5]}, name="judge")
    made = repack(source, tmp_path / "b.zarr")
    assert made.example_table.table(["mark"])["mark"].to_pylist() == [None, None, 0.5, None]
    assert verify(made.path).problems == []


def test_a_recording_of_open_size(tmp_path: Path) -> None:
    source = Archive(make_archive(tmp_path / "a.zarr", open_size=True))
    made = repack(source, tmp_path / "b.zarr")
    assert (stored(made), made.n_rows, made.is_sealed) == (stored(source), N_ROWS, True)
    assert verify(made.path).problems == []


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    source, out = Archive(make_archive(tmp_path / "a.zarr")), tmp_path / "b.zarr"

    def stop(done: int, _: int) -> None:
        if done < N_ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(source, out, shard_bytes=40 * 4 * 32, on_row=stop)
    assert not Archive(out).is_sealed
    path = out / "sites/resid_post/0/c/0/0"
    written = path.stat().st_mtime_ns
    made = repack(source, out, shard_bytes=40 * 4 * 32)
    assert (stored(made), path.stat().st_mtime_ns) == (stored(source), written)
    with pytest.raises(PlanError, match=re.escape(str(out))):
        repack(source, out, shard_bytes=2**30)
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"c\.zarr"):
        repack(source, tmp_path / "c.zarr")


def test_damage_is_not_copied(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    for name in ("sites/q/1/c/1/0/0", "rows/token/c/1"):
        path = source / name
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedArchiveError, match=re.escape(name)):
            repack(source, tmp_path / name.replace("/", "-"))
        data[7] ^= 1
        path.write_bytes(data)


def test_a_capture_is_run_again_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "ragged.jsonl", 20, seed=3)
    source = tmp_path / "a.zarr"
    residua.capture_dataset(str(MODEL), str(dataset), out=source, sites="resid_post.3,q.1", rows_per_shard=128)
    assert main(["pack", str(source), "--for", "hub", "--out", str(tmp_path / "b.zarr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 1
    made, before = Archive(tmp_path / "b.zarr"), Archive(source)
    assert captured_groups(made, schedule_of(made)) == captured_groups(before, schedule_of(before))
    assert all(made.batch_of(i) == before.batch_of(i) for i in range(20))
    assert residua.reproduce(str(MODEL), made, n_batches=9).is_exact
    assert any(before.plan.digest[:12] in str(note) for note in made.provenance["notes"])  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="no repacking"):
        repack(made, tmp_path / "c.zarr")
    assert main(["pack", str(source), "--for", "hub"]) == 2
    assert "--out" in capsys.readouterr().err
