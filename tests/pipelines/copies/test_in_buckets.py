"""Copies of archives and exports that go straight into a bucket: what a folder gets, also after a stop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from residua.pipelines.copies.concat import concat
from residua.pipelines.copies.export import ExportFormat, export
from residua.pipelines.copies.extract import extract
from residua.pipelines.copies.repack import repack
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.sharing.push import push
from residua.store.verification.verify import verify
from tests.servers.objects import files, objects
from tests.servers.s3 import S3Server
from tests.store.small_archive import make_archive

pytestmark = pytest.mark.timeout(300)


class Source(NamedTuple):
    """One archive in a folder and the same in a bucket."""

    here: Archive
    there: Archive


@pytest.fixture(scope="module")
def source(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = make_archive(tmp_path_factory.mktemp("source") / "a.zarr")
    push(folder, s3.address("copies/a.zarr"), storage_options=s3.options)
    return Source(Archive(folder), open_archive(s3.address("copies/a.zarr"), storage_options=s3.options))


def stop_after(n: int) -> Callable[[int, int], None]:
    def on_row(*_: int) -> None:
        nonlocal n
        n -= 1
        if n < 0:
            raise KeyboardInterrupt

    return on_row


def extracted(source: Source, out: Any, **options: Any) -> Archive:
    return extract(source.there, out, rows="position > 0", **options)


def concatenated(source: Source, out: Any, **options: Any) -> Archive:
    return concat([source.there, source.there], out, **options)


def repacked(source: Source, out: Any, **options: Any) -> Archive:
    return repack(source.there, out, shard_bytes=40 * 4 * 32, **options)


@pytest.mark.parametrize("job", [extracted, concatenated, repacked])
def test_a_bucket_gets_the_archive_of_a_folder_and_goes_on_after_a_stop(
    job: Callable[..., Archive], source: Source, s3: S3Server, tmp_path: Path
) -> None:
    disk = job(source, tmp_path / "a.zarr")
    address = s3.address(f"copies/{job.__name__}.zarr")
    with pytest.raises(KeyboardInterrupt):
        job(source, address, storage_options=s3.options, on_row=stop_after(0))
    begun = open_archive(address, storage_options=s3.options)
    assert not begun.is_sealed
    made = job(source, address, storage_options=s3.options)
    assert (made.place, made.is_sealed, made.n_rows) == (address, True, disk.n_rows)
    assert objects(address, s3.options) == files(tmp_path / "a.zarr")
    assert verify(address, storage_options=s3.options).problems == []
    with pytest.raises(FileExistsError, match=job.__name__):
        extract(source.there, address, rows="position == 1", storage_options=s3.options)


def test_a_folder_goes_on_after_a_stop(source: Source, tmp_path: Path) -> None:
    for job in (extracted, concatenated):
        with pytest.raises(KeyboardInterrupt):
            job(source, tmp_path / job.__name__, on_row=stop_after(0))
        assert not Archive(tmp_path / job.__name__).is_sealed
        with pytest.raises(FileExistsError, match=job.__name__):
            extract(source.there, tmp_path / job.__name__, rows="position == 1")
        assert job(source, tmp_path / job.__name__).is_sealed
        job(source, tmp_path / "at once" / job.__name__)
        assert files(tmp_path / job.__name__) == files(tmp_path / "at once" / job.__name__)


@pytest.mark.parametrize("to", ["parquet", "safetensors", "npy", "hf"])
def test_exports(
    to: ExportFormat, source: Source, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"to": to, "sites": "resid_post.0", "storage_options": s3.options}
    export(source.there, tmp_path / "out" / to, **settings)
    address = s3.address(f"exports/{to}")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(OSError, match=r"TMPDIR"):
            export(source.there, address, **settings)
    assert export(source.there, address, **settings) == address
    found = {name: data for name, data in objects(s3.address("exports"), s3.options).items() if name.startswith(to)}
    assert found == files(tmp_path / "out")
    with pytest.raises(FileExistsError, match=address):
        export(source.there, address, **settings)


def test_addresses_that_are_only_read_are_refused(source: Source) -> None:
    for job in (extracted, concatenated, repacked):
        with pytest.raises(PlanError, match=r"https://example\.org/x"):
            job(source, "https://example.org/x")
