"""Jobs try their place, and look for room, before anything is computed."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.circuits.induction import heads_place
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from tests.models.tiny import TINY, VOCABULARY

Usage = namedtuple("Usage", "total used free")
TOKENS = [[5, 6, 7, 8]] * 3


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY["llama"]()


@pytest.fixture(scope="module")
def archive(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    out = tmp_path_factory.mktemp("place") / "b.zarr"
    return capture_dataset(model, TOKENS, out=out, sites="resid_post.*", dtype="bfloat16").archive


@pytest.fixture
def n_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list with one item for each call of the model."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_the_model_does_not_run_where_nothing_can_be_written(
    model: PreTrainedModel,
    archive: Archive,
    n_calls: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="https"):
        capture_dataset(model, [[5, 6, 7]], out="https://host/a.zarr", sites="embed")
    with pytest.raises(PlanError, match="hf://"):
        residua.Recorder(model, sites="embed", out="hf://datasets/me/a")
    with pytest.raises(PlanError, match="https"):
        residua.replay_dataset(model, archive, out="https://host/a", at="resid_post.1")
    with pytest.raises(PlanError, match="hf://"):
        heads_place("hf://datasets/me/a.zarr")
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fail)
        with pytest.raises(OSError, match=r"a\.zarr.*no hard links"):
            capture_dataset(model, [[5, 6, 7]], out=tmp_path / "a.zarr", sites="embed")
        with pytest.raises(OSError, match=r"a\.zarr.*no hard links"):
            residua.Recorder(model, sites="embed", out=tmp_path / "a.zarr")
        with pytest.raises(OSError, match=r"replayed.*no hard links"):
            residua.replay_dataset(model, archive, out=tmp_path / "replayed", capture="resid_post.1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=archive.path.name):
            residua.fidelity(model, archive.path, n_batches=1)
        with pytest.raises(OSError, match="swept"):
            residua.patch(model, [{"clean": [5], "corrupted": [6], "answer": 1}], metric="loss", out="swept")
    assert not n_calls
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert n_calls


def lens(archive: Archive) -> None:
    residua.TunedLens.fit(archive, out="lens")


def probe(archive: Archive) -> None:
    residua.probe(archive, "position", save="probes")


def command(*words: str) -> Callable[[Archive], int]:
    return lambda archive: main([word.format(archive.path) for word in (*words, "--scheduler", "inline")])


@pytest.mark.parametrize(
    "job",
    [
        lens,
        probe,
        command("lens", "train", "{}", "--out", "out"),
        command("probe", "{}", "--target", "position", "--out", "out"),
        command("probe", "{}", "--target", "position"),
        command("stats", "{}", "--out", "out"),
        command("stats", "{}"),
        command("top", "{}", "--site", "resid_post.0", "--channel", "0", "--out", "out"),
        command("induction", "--model", "none", "--out", "out.zarr"),
    ],
    ids=lambda job: job.__name__,
)
def test_analyses_compute_nothing_that_cannot_be_written(
    job: Callable[[Archive], int | None],
    archive: Archive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("residua.analysis.support.cluster._Inline.map", computed)
    monkeypatch.setattr("residua.store.read.array.ArchiveArray.numpy", computed)
    monkeypatch.setattr(os, "replace", fail)
    try:
        assert job(archive) == 2
        message = capsys.readouterr().err
    except OSError as error:
        message = str(error)
    assert "cannot write" in message
    assert "another place" in message or "see the cause" in message
    assert not list(tmp_path.iterdir())


def test_a_link_as_out_is_followed(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real.zarr").mkdir(parents=True)
    (tmp_path / "name").symlink_to(tmp_path / "disk" / "real.zarr")
    made = capture_dataset(model, TOKENS, out=tmp_path / "name", sites="resid_post.1").archive
    assert made.path == tmp_path / "disk" / "real.zarr"
    again = capture_dataset(model, TOKENS, out=tmp_path / "name", sites="resid_post.1")
    assert again.resumed
    assert (tmp_path / "name").is_symlink()
    torch.testing.assert_close(Archive(tmp_path / "name")["resid_post.1"].torch(), made["resid_post.1"].torch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "name"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.zarr"]


def test_room_is_looked_for_before_the_capture_runs(
    model: PreTrainedModel, archive: Archive, n_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, row_bytes = 0, 4 * VOCABULARY
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, free))
    free = 100
    with pytest.raises(OSError, match=r"a\.zarr.*GiB.*12 rows"):
        capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", sites="logits", codec="raw")
    with pytest.raises(OSError, match=r"replayed.*GiB.*12 rows"):
        residua.replay_dataset(model, archive, out=tmp_path / "replayed", capture="logits")
    assert not list(tmp_path.iterdir())
    # Half of the rows fit, and they may compress.
    free = 6 * row_bytes
    found = capture_dataset(model, TOKENS, out=tmp_path / "c.zarr", sites="logits")
    assert len([note for note in found.notes if "free space" in note]) == 1
    assert "free space" in str(found.archive.provenance["notes"])
    free = 0  # nothing is missing, so nothing has to fit
    again = capture_dataset(model, TOKENS, out=tmp_path / "c.zarr", sites="logits")
    assert not any("free space" in note for note in again.notes)
    assert n_calls
