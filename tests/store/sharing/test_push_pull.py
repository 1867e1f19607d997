"""Archives copied to a real S3 server and back: the same bytes, also after kills, and damage is never copied."""

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from residua.store.base.canonical import canonical_json
from residua.store.base.errors import DamagedArchiveError, NotCapturedError, PlanError, StorageError, UnknownSiteError
from residua.store.format.archive_metadata import is_archive, read_metadata, write_metadata
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sharing.copy import copy
from residua.store.sharing.pull import pull
from residua.store.sharing.push import push
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.servers.files import serving_files
from tests.servers.proxy import proxied
from tests.servers.s3 import S3Server
from tests.store.small_archive import make_archive

pytestmark = pytest.mark.timeout(300)
N_KILLS = 20


def content(folder: Path) -> dict[str, bytes]:
    """Return what a copy has to hold; records stay behind, since the index says the same."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("commits/")}


def test_there_and_back(s3: S3Server, tmp_path: Path) -> None:
    source, address, steps = make_archive(tmp_path / "a.zarr"), s3.address("there.zarr"), []
    sent = push(source, address, storage_options=s3.options, on_bytes=lambda *step: steps.append(step))
    size = sum(map(len, content(source).values()))
    assert (sent.n_files, sent.n_bytes, sent.sent_bytes) == (len(content(source)), size, size)
    assert (steps[-1], steps) == ((size, size), sorted(steps))
    back = pull(address, tmp_path / "back.zarr", storage_options=s3.options)
    assert (back.n_files, back.n_bytes, back.sent_bytes) == (sent.n_files, size, size)
    assert content(tmp_path / "back.zarr") == content(source)
    assert verify(tmp_path / "back.zarr").problems == []
    assert np.array_equal(RemoteArchive(address, storage_options=s3.options)["q.1"][:], Archive(source)["q.1"][:])


def test_what_is_there_is_not_copied_again(s3: S3Server, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), s3.address("again.zarr")
    first = push(source, address, storage_options=s3.options)
    shards = sum(len(data) for name, data in content(source).items() if "/c/" in name)
    assert push(source, address, storage_options=s3.options).sent_bytes == first.sent_bytes - shards
    pull(address, tmp_path / "back.zarr", storage_options=s3.options)
    assert pull(address, tmp_path / "back.zarr", storage_options=s3.options).sent_bytes < first.sent_bytes - shards
    altered = tmp_path / "back.zarr" / "sites" / "q" / "1" / "c" / "0" / "0" / "0"
    altered.write_bytes(bytes(altered.stat().st_size))
    pull(address, tmp_path / "back.zarr", storage_options=s3.options)
    assert content(tmp_path / "back.zarr") == content(source)


def test_some_sites_are_an_archive_that_says_what_it_lacks(s3: S3Server, tmp_path: Path) -> None:
    source, address, out = make_archive(tmp_path / "a.zarr"), s3.address("some.zarr"), tmp_path / "some.zarr"
    push(source, address, storage_options=s3.options)
    pull(address, out, sites="q.*", storage_options=s3.options)
    some = Archive(out)
    assert (some.sites, some.absent_sites) == (("q.1",), ("resid_post.0",))
    assert np.array_equal(some["q.1"][:], Archive(source)["q.1"][:])
    assert any("resid_post.0" in note for note in verify(out).notes)
    assert verify(out).problems == []
    pull(address, out, storage_options=s3.options)
    assert content(out) == content(source)
    with pytest.raises(UnknownSiteError, match="attn_out"):
        pull(address, tmp_path / "b.zarr", sites="attn_out.*", storage_options=s3.options)


def test_one_call_copies_in_both_directions(s3: S3Server, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), s3.address("copied.zarr")
    copy(source, address, storage_options=s3.options)
    copy(address, tmp_path / "b.zarr", sites="q.*", storage_options=s3.options)
    assert Archive(tmp_path / "b.zarr").sites == ("q.1",)
    with pytest.raises(PlanError, match="residua extract"):
        copy(source, address, sites="q.*", storage_options=s3.options)
    with pytest.raises(PlanError, match="license"):
        copy(address, tmp_path / "d.zarr", license="mit", storage_options=s3.options)


def test_archives_are_not_mixed(s3: S3Server, tmp_path: Path) -> None:
    one, other = make_archive(tmp_path / "a.zarr"), make_archive(tmp_path / "b.zarr", seed=1)
    address = s3.address("mixed.zarr")
    push(one, address, storage_options=s3.options)
    with pytest.raises(PlanError, match=r"mixed\.zarr holds another archive"):
        push(other, address, storage_options=s3.options)
    with pytest.raises(PlanError, match=r"b\.zarr holds another archive"):
        pull(address, other, storage_options=s3.options)
    begun = ObjectFolder(s3.address("begun.zarr"), s3.options)
    begun.create(".residua-push.json", b'{"plan": "of another archive"}')
    with pytest.raises(PlanError, match="begun"):
        push(one, begun.address, storage_options=s3.options)
    assert [entry.name for entry in begun.list()] == [".residua-push.json"], "nothing appears beside another's"


def test_a_site_that_was_added_goes_alone(s3: S3Server, tmp_path: Path) -> None:
    whole = make_archive(tmp_path / "a.zarr")
    part = make_archive(tmp_path / "part.zarr", sites=("resid_post.0",))
    address = s3.address("grows.zarr")
    journal = canonical_json(Archive(part).plan.to_json())
    ObjectFolder(address, s3.options).create(".residua-push.json", journal)  # a copy of the part was begun
    push(whole, address, storage_options=s3.options)
    with pytest.raises(PlanError, match="another archive"):
        push(part, address, storage_options=s3.options)
    address = s3.address("grows-again.zarr")
    push(part, address, storage_options=s3.options)
    shards = {name: len(data) for name, data in content(whole).items() if "/c/" in name and "q/1" not in name}
    sent = push(whole, address, storage_options=s3.options)
    assert sent.sent_bytes == sent.n_bytes - sum(shards.values())
    assert {entry.name for entry in ObjectFolder(address, s3.options).list()} == content(whole).keys()
    assert verify(address, storage_options=s3.options).problems == []


def test_damage_is_not_copied(s3: S3Server, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), s3.address("damaged.zarr")
    good = push(source, s3.address("good.zarr"), storage_options=s3.options)
    path = source / "sites" / "q" / "1" / "c" / "1" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArchiveError, match="sites/q/1/c/1"):
        push(source, address, storage_options=s3.options)
    with pytest.raises(FileNotFoundError):
        RemoteArchive(address, storage_options=s3.options)
    with serving_files(tmp_path) as server, pytest.raises(DamagedArchiveError, match="sites/q/1/c/1"):
        pull(f"{server.url}/a.zarr", tmp_path / "copy.zarr")
    assert not is_archive(tmp_path / "copy.zarr")
    assert good.n_bytes


def test_what_is_missing_at_the_end_makes_no_archive(s3: S3Server, tmp_path: Path) -> None:
    source, lost = make_archive(tmp_path / "a.zarr"), "sites/q/1/c/1/0/0"
    there, asked = ObjectFolder(s3.address("lost.zarr"), s3.options), []

    def lose(method: str, path: str) -> None:
        asked.append((method, urlsplit(path).path.endswith("/lost.zarr/zarr.json"), "list-type" in path))
        if [is_list for _, _, is_list in asked].count(True) == 2 and asked[-1][2]:
            there.delete([lost])  # which the server has just confirmed

    def push_through() -> None:
        asked.clear()
        push(source, there.address, storage_options={**s3.options, "endpoint": proxy.url})

    with proxied(s3.options["endpoint"]) as proxy:
        proxy.fault = lose
        with pytest.raises(StorageError, match=f"lacks {lost}"):
            push_through()
        with pytest.raises(FileNotFoundError):
            RemoteArchive(there.address, storage_options=s3.options)
        with pytest.raises(StorageError, match=f"lacks {lost}"):
            push_through()
        assert ("PUT", True, False) not in asked, "what was there before is listed before there is a root"
        proxy.fault = lambda *_: None
        push_through()
    assert {entry.name for entry in there.list()} == content(source).keys()
    assert verify(there.address, storage_options=s3.options).problems == []


def test_what_is_not_finished_cannot_go(s3: S3Server, tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    write_metadata(source, replace(read_metadata(source), index=None))
    with pytest.raises(NotCapturedError, match="residua pack"):
        push(source, s3.address("unfinished-push.zarr"), storage_options=s3.options)


def test_killed_at_random_moments_both_go_on(s3: S3Server, tmp_path: Path) -> None:
    source, address, out = make_archive(tmp_path / "a.zarr"), s3.address("killed-push.zarr"), tmp_path / "back.zarr"
    moments, context = random.Random(3), multiprocessing.get_context("forkserver")  # so that each starts at once
    context.set_forkserver_preload(["residua.store.sharing.push", "residua.store.sharing.pull"])
    copies: list[tuple[Callable[..., object], tuple[object, object]]] = [
        (push, (source, address)),
        (pull, (address, out)),
    ]
    for work, arguments in copies:
        begun = time.monotonic()
        process = context.Process(target=work, args=arguments, kwargs={"storage_options": s3.options})
        process.start()
        process.join()
        seconds = time.monotonic() - begun
        assert process.exitcode == 0
        if work is push:
            folder = ObjectFolder(address, s3.options)
            folder.delete([entry.name for entry in folder.list()])
        else:
            shutil.rmtree(out)
        for _ in range(N_KILLS):
            process = context.Process(target=work, args=arguments, kwargs={"storage_options": s3.options})
            process.start()
            process.join(moments.uniform(0.1, 1.0) * seconds)
            process.kill()
            process.join()
        work(*arguments, storage_options=s3.options)
    there = {entry.name for entry in ObjectFolder(address, s3.options).list()}
    assert there == content(source).keys(), "and nothing else is left"
    assert content(out) == content(source)
    assert verify(out).problems == []


def test_side_tables_go_along_and_none_is_lost(s3: S3Server, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), s3.address("side.zarr")
    Archive(source).annotate({"example": [1], "mark": ["x"]}, name="judge")
    push(source, address, storage_options=s3.options)
    there = RemoteArchive(address, storage_options=s3.options)
    assert there.example_table.table(["mark"])["mark"].to_pylist() == [None, "x", None, None]
    assert verify(address, storage_options=s3.options).problems == []
    pull(address, tmp_path / "b.zarr", storage_options=s3.options)
    assert content(tmp_path / "b.zarr") == content(source)
    mine = Archive(tmp_path / "b.zarr")
    mine.annotate({"row": [3], "more": [1.5]}, key="row", name="more")
    pull(address, tmp_path / "b.zarr", storage_options=s3.options)
    assert [table.name for table in mine.side_tables] == ["judge", "more"]
    push(mine, address, storage_options=s3.options)
    again = RemoteArchive(address, storage_options=s3.options)
    assert again.example_table.table(["more"]).equals(mine.example_table.table(["more"]))
    with pytest.raises(PlanError, match="more"):
        push(source, address, storage_options=s3.options)
    plain = make_archive(tmp_path / "plain.zarr")
    push(plain, address, storage_options=s3.options)
    assert len(RemoteArchive(address, storage_options=s3.options).side_tables) == 2
