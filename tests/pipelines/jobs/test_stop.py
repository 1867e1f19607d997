"""Runs that stop early: a signal, a failing writer, a failing model, an exception in the user's loop."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import CaptureError
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file
from residua.store.verification.verify import verify
from tests.forking import ENVIRONMENT, ROOT, Forks
from tests.models.tiny import VOCABULARY
from tests.ragged import capture_words, write_dataset
from tests.stopped import await_commits, check_end

SITES = ("--sites", "resid_post.3,z.1")
SECONDS = 150


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 27, seed=2)


@pytest.fixture(scope="module")
def reference(forks: Forks, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "a.zarr"
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    return out


def hooks(model: torch.nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(
    number: signal.Signals, forks: Forks, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    child = forks.start(capture_words(dataset, out, *SITES), slow=0.05)
    await_commits(out)
    child.send_signal(number)
    ended = child.wait()
    assert ended.code == 130
    assert "Run the same command again to go on" in ended.output
    assert "Traceback" not in ended.output
    rows = Archive(out).progress.rows
    assert f"stopped: {rows:,} of {Archive(reference).n_rows:,} rows are captured and safe" in ended.output
    assert 0 < rows < Archive(reference).n_rows
    report = verify(out)
    assert report.problems == []
    assert not [note for note in report.notes if "temporary" in note]
    assert forks.run(capture_words(dataset, out, *SITES)).code == 0
    check_end(out, reference)


def test_a_signal_before_the_archive_exists(forks: Forks, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    child = forks.start(capture_words(dataset, out, *SITES))
    child.await_file(out.with_name(".a.zarr.lock"))  # the first thing of all
    child.send_signal(signal.SIGINT)
    ended = child.wait()
    assert ended.code == 130
    assert "Traceback" not in ended.output
    assert "Run the same command again" in ended.output


def test_ctrl_c_in_a_process_of_its_own(dataset: Path, tmp_path: Path) -> None:
    """The command as a user runs it, stopped while it still imports or already computes."""
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--json")
    process = subprocess.Popen(
        [sys.executable, "-m", "residua", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    await_commits(out)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors
    assert output.startswith("{")
    assert verify(out).problems == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what the process has loaded")
def test_ctrl_c_while_torch_is_imported(dataset: Path, tmp_path: Path) -> None:
    words = capture_words(dataset, tmp_path / "a.zarr", *SITES)
    process = subprocess.Popen(
        [sys.executable, "-m", "residua", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline, "torch was never loaded"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Run the same command again" in output


def refuse_some_writes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the disk refuse the files of all shards but the first."""

    def refuse(path: Path, parts: Any) -> int:
        if "/c/" in path.as_posix() and "/c/0/" not in f"{path.as_posix()}/":
            raise OSError(28, f"cannot write {path}: {name}")
        return write_file(path, parts)

    monkeypatch.setattr("residua.store.storage.destination.write_file", refuse)


def test_a_failing_writer_reaches_the_caller_who_waits_for_a_host_buffer(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [[i % VOCABULARY] * 40 for i in range(20)]
    options: dict[str, Any] = {"sites": "resid_post.*", "rows_per_shard": 16, "batch_tokens": 80}
    before = hooks(llama)
    with monkeypatch.context() as patch:
        refuse_some_writes(patch, "on purpose")
        with pytest.raises(CaptureError, match="on purpose") as caught:
            capture_dataset(llama, data, out=tmp_path / "a.zarr", **options)
    assert isinstance(caught.value.__cause__, OSError)
    assert "run the same capture again" in str(caught.value)
    assert hooks(llama) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("residua-writer")]
    assert list(Archive(tmp_path / "a.zarr").commits) == [0]
    assert capture_dataset(llama, data, out=tmp_path / "a.zarr", **options).archive.is_sealed
    capture_dataset(llama, data, out=tmp_path / "b.zarr", **options)
    (tmp_path / "c").mkdir()
    (tmp_path / "a.zarr").rename(tmp_path / "c" / "a.zarr")
    check_end(tmp_path / "c" / "a.zarr", tmp_path / "b.zarr")


def test_an_archive_that_vanishes_is_an_error(llama: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    data = [[i % VOCABULARY] * 40 for i in range(20)]

    def take_away(*_: object) -> None:
        if not (tmp_path / "moved.zarr").exists():
            out.rename(tmp_path / "moved.zarr")

    with pytest.raises(CaptureError, match=str(out)) as caught:
        capture_dataset(llama, data, out=out, sites="resid_post.0", rows_per_shard=16, on_batch=take_away)
    assert isinstance(caught.value.__cause__, OSError)
    assert verify(tmp_path / "moved.zarr").problems == []


def test_a_model_that_raises_leaves_model_and_archive_sound(llama: PreTrainedModel, tmp_path: Path) -> None:
    data = [[i % VOCABULARY] * 40 for i in range(20)]
    options: dict[str, Any] = {"sites": "resid_post.*,pattern.1", "rows_per_shard": 64, "batch_tokens": 80}
    before = hooks(llama), llama.config._attn_implementation
    n_calls = 0

    def fail_later(*_: object) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 8:
            raise RuntimeError("CUDA out of memory, say")

    handle = llama.model.layers[1].register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        capture_dataset(llama, data, out=tmp_path / "a" / "a.zarr", **options)
    handle.remove()
    assert (hooks(llama), llama.config._attn_implementation) == before
    assert verify(tmp_path / "a" / "a.zarr").problems == []
    assert len(Archive(tmp_path / "a" / "a.zarr").commits) > 0
    capture_dataset(llama, data, out=tmp_path / "a" / "a.zarr", **options)
    capture_dataset(llama, data, out=tmp_path / "b.zarr", **options)
    check_end(tmp_path / "a" / "a.zarr", tmp_path / "b.zarr")


def batch(i: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(4 * 10).reshape(4, 10) % 90 + i
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loop(model: PreTrainedModel, out: Path, n_batches: int, *, then_fail: bool = False) -> None:
    """The loop that a user owns."""
    with residua.Recorder(model, sites="resid_post.*", out=out, rows_per_shard=64) as recorder:
        for i in range(n_batches):
            recorder.annotate(columns={"label": [f"{i}"] * 4})
            model(**batch(i))
        if then_fail:
            raise ZeroDivisionError


def test_an_exception_in_the_users_loop_leaves_a_readable_archive(llama: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    before = hooks(llama)
    with pytest.raises(ZeroDivisionError):
        loop(llama, out, 4, then_fail=True)
    assert hooks(llama) == before
    archive = Archive(out)
    assert not archive.is_sealed
    assert archive.progress.rows == archive.n_rows == 128
    assert verify(out).problems == []
    ids = torch.cat([batch(i)["input_ids"].flatten() for i in range(4)])[:128]
    assert archive.rows.token[...].tolist() == ids.tolist()
    assert archive["resid_post.0"][...].shape == (128, 32)


def test_a_failing_writer_reaches_the_users_loop(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_some_writes(monkeypatch, "on purpose")
    before = hooks(llama)
    with pytest.raises(CaptureError, match="on purpose"):
        loop(llama, tmp_path / "a.zarr", 20)
    assert hooks(llama) == before
    assert verify(tmp_path / "a.zarr").problems == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("residua-writer")]
