"""Sites added to a finished archive: the same as captured at once, and only their own shards are new."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.add_sites import add_sites
from residua.pipelines.cli.main import main
from residua.pipelines.copies.join_sites import ADDED
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import NotCapturedError, PlanError, StorageError
from residua.store.read.archive import Archive
from residua.store.sharing.push import push
from residua.store.storage.objects import ObjectFolder
from residua.store.verification.verify import verify
from tests.models.tiny import TINY
from tests.pipelines.small_capture import capture
from tests.plain_zarr import plain_array
from tests.servers.s3 import S3Server
from tests.stopped import take_back

SITES, NEW = "resid_post.*", ["attn_out.0", "mlp_out.1"]


def shards_of(archive: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every shard file."""
    files = [path for path in (archive / "sites").rglob("c/*/*") if path.is_file()]
    return {path.relative_to(archive).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def added(model: PreTrainedModel, tokens: Any, out: Path, sites: Any = NEW, **options: Any) -> Archive:
    settings = CaptureSettings.from_mapping({"sites": ",".join(sites), **options})
    return add_sites(model, tokens, out=out, settings=settings).archive


def test_values_are_those_of_one_capture_and_old_shards_stay(
    s3: S3Server, llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    at_once = capture(llama, tokens, tmp_path / "all.zarr", sites=",".join([SITES, *NEW])).archive
    capture(llama, tokens, tmp_path / "a.zarr", sites=SITES, head=True)
    (tmp_path / "a.zarr" / "README.md").write_text("mine")
    before = shards_of(tmp_path / "a.zarr")
    address = s3.address("values/a.zarr")
    push(tmp_path / "a.zarr", address, storage_options=s3.options)
    found = added(llama, tokens, tmp_path / "a.zarr", NEW[:1])
    found = added(llama, tokens, tmp_path / "a.zarr", NEW[1:], codec="raw")
    after = shards_of(tmp_path / "a.zarr")
    sent = push(tmp_path / "a.zarr", address, storage_options=s3.options)
    assert set(found.sites) == set(at_once.sites)
    for site in at_once.sites:
        expected = plain_array(at_once.path, at_once.plan.site(site).path)
        assert np.array_equal(plain_array(found.path, found.plan.site(site).path), expected)
    assert before.items() <= after.items()
    new = sum((found.path / name).stat().st_size for name in after.keys() - before.keys())
    others = [path for path in found.path.rglob("*") if path.is_file() and path.parts[-3] != "c"]
    assert new < sent.sent_bytes <= new + sum(path.stat().st_size for path in others)
    assert verify(found.path).problems == []
    assert (found.path / "README.md").read_text() == "mine"
    assert found.head.is_dir()
    entries: Any = found.provenance[ADDED]
    assert [entry["sites"] for entry in entries] == [NEW[:1], NEW[1:]]
    assert sorted(path.name for path in tmp_path.glob("*.zarr*")) == ["a.zarr", "all.zarr"]
    assert not [path for path in tmp_path.glob(".a.zarr.*") if path.is_dir()]


def test_what_differs_is_refused_by_name_and_leaves_nothing(
    llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    capture(llama, tokens, out, sites=SITES)
    before = shards_of(out)
    with pytest.raises(PlanError, match=r"resid_post\.0 already"):
        added(llama, tokens, out, ["resid_post.0"])
    with pytest.raises(PlanError, match=r"rules\.positions"):
        added(llama, tokens, out, positions="last")
    with pytest.raises(PlanError, match=r"dataset\."):
        added(llama, tokens[:-1], out)
    other = TINY["llama"]()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)  # type: ignore[operator]
    with pytest.raises(PlanError, match=r"model\.weights"):
        added(other, tokens, out)
    with pytest.raises(PlanError, match="is an address"):
        added(llama, tokens, "https://host/a.zarr")  # type: ignore[arg-type]
    assert not [path for path in tmp_path.glob(".a.zarr.*") if path.is_dir()]
    take_back(out, 1)
    with pytest.raises(NotCapturedError, match="not finished"):
        added(llama, tokens, out)
    assert shards_of(out) == before


def test_what_was_stopped_goes_on(llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    capture(llama, tokens, out, sites=SITES)

    def stop(stats: Any) -> None:
        if stats.rows > 100:
            raise KeyboardInterrupt

    settings = CaptureSettings.from_mapping({"sites": NEW[0]})
    with pytest.raises(KeyboardInterrupt):
        add_sites(llama, tokens, out=out, settings=settings, on_batch=stop)
    old = Archive(out).sites
    assert NEW[0] not in old
    assert add_sites(llama, tokens, out=out, settings=settings).resumed
    assert Archive(out).sites == (*old, NEW[0])
    out.rename(tmp_path / ".a.zarr.before")  # as after a kill between the two renames
    assert set(added(llama, tokens, out, NEW[1:]).sites) == {*old, *NEW}
    assert verify(out).problems == []


@pytest.mark.parametrize("is_pushed", [False, True], ids=["captured there", "pushed"])
def test_sites_are_added_in_a_bucket(
    s3: S3Server, llama: PreTrainedModel, tokens: list[list[int]], tmp_path: Path, is_pushed: bool
) -> None:
    """The archive is the one that a capture of all sites gives; a kill while metadata change is taken up."""
    name, options = f"added-{is_pushed}", cast("Any", {"storage_options": s3.options})
    address, folder = s3.address(f"{name}/a.zarr"), ObjectFolder(s3.address(name), s3.options)
    at_once = capture(llama, tokens, tmp_path / "all.zarr", sites=",".join([SITES, *NEW]), head=True).archive
    if is_pushed:
        capture(llama, tokens, tmp_path / "a.zarr", sites=SITES, head=True)
        push(tmp_path / "a.zarr", address, **options)
    else:
        capture(llama, tokens, address, sites=SITES, head=True, **options)
    with pytest.raises(PlanError, match=r"resid_post\.0 already"):
        added_there(llama, tokens, address, ["resid_post.0"], s3)
    with monkeypatched_copy(f"{name}/a.zarr/zarr.json"), pytest.raises(StorageError, match="killed"):
        added_there(llama, tokens, address, NEW[:1], s3)
    found = added_there(llama, tokens, address, NEW[1:], s3)  # which goes on with the first one, too
    assert set(found.sites) == set(at_once.sites)
    names = {entry.name for entry in folder.list()}
    assert all(each.startswith("a.zarr/") for each in names), names
    assert not [each for each in names if "lease" in each or "trial" in each]
    assert verify(address, **options).problems == []
    residua.pull(address, tmp_path / "back.zarr", **options)
    for site in at_once.sites:
        expected = plain_array(at_once.path, at_once.plan.site(site).path)
        assert np.array_equal(plain_array(tmp_path / "back.zarr", found.plan.site(site).path), expected)
    entries: Any = found.provenance[ADDED]
    assert [entry["sites"] for entry in entries] == [NEW[:1], NEW[1:]]


def added_there(model: PreTrainedModel, tokens: Any, out: str, sites: Any, server: S3Server) -> Archive:
    settings = CaptureSettings.from_mapping({"sites": ",".join(sites)})
    return add_sites(model, tokens, out=out, settings=settings, storage_options=server.options).archive


@contextmanager
def monkeypatched_copy(last: str) -> Iterator[None]:
    """Let the copy of one object in a bucket fail."""
    copy = ObjectFolder.copy

    def fail(folder: ObjectFolder, source: str, name: str) -> None:
        if name == last:
            raise StorageError("killed")
        copy(folder, source, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ObjectFolder, "copy", fail)
        yield


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TINY["llama"]().save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n{"input_ids": [9, 10]}\n')
    places = {"--model": "model", "--dataset": "d.jsonl", "--out": "a.zarr"}
    words = [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
    assert main(["capture", *words, "--sites", SITES]) == 0
    assert main(["capture", *words, "--add-sites", "attn_out.*"]) == 0
    assert Archive(tmp_path / "a.zarr").select("attn_out.*")
    assert main(["capture", *words, "--add-sites", "attn_out.*"]) == 2
    assert "already" in capsys.readouterr().err
