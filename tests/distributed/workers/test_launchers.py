"""Launchers (torchrun, accelerate), and a user's own script: a process group, DDP, FSDP2 and ZeRO-3 in forked ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from residua.store.read.archive import Archive
from residua.store.storage.lock import read_owner
from residua.store.verification.verify import verify
from tests.distributed.model_parallel.recorder_loop import record
from tests.distributed.workers.user_script import capture
from tests.forking import ENVIRONMENT, ROOT, ForkedWorkers, Start, launched
from tests.models.tiny import TINY
from tests.ragged import capture_words, write_dataset
from tests.stopped import await_commits, content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 300
SITES = ("--sites", "resid_post.3,q.2", "--dtype", "bfloat16")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what a launch printed; fails unless it succeeded."""
    with process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, errors[-4000:]
    return output


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ragged.jsonl", 120)


@pytest.fixture(scope="module")
def reference(forked_workers: ForkedWorkers, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "a.zarr"
    [ended] = forked_workers.run([Start(words=capture_words(dataset, out, *SITES), env={})])
    assert ended.code == 0, ended.output
    return out


def test_accelerate_launch(dataset: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    launch = ("accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    said = finish(start(*launch, *options, "-m", "residua", *capture_words(dataset, out, *SITES)))
    assert content(out) == content(reference)
    assert said.count("captured ") == 1, "one of the workers reports"


def test_torchrun_starts_the_workers_again_when_one_is_killed(dataset: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    words = capture_words(dataset, out, *SITES, "--json")
    launch = start(*TORCHRUN, "--max-restarts", "2", "--monitor-interval", "0.1", "-m", "residua", *words)
    await_commits(out, 3, is_running=lambda: launch.poll() is None)
    owner = read_owner(out)
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    before = sorted(out.glob("commits/*.json"))
    said = json.loads(finish(launch).splitlines()[-1])
    assert said["run"]["resumed"]
    assert len(said["workers"]) == 2
    assert said["run"]["committed_rows"] <= Archive(out).n_rows - 32 * len(before)
    assert content(out) == content(reference)
    assert verify(out).problems == []


def test_a_script_of_the_users_own_with_replicas_and_sharded(forked_workers: ForkedWorkers, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    capture(TINY["llama"](), tmp_path / "one.zarr")
    ended = forked_workers.run(launched([str(tmp_path)], 2, module="tests.distributed.workers.user_script"), SECONDS)
    assert [end.code for end in ended] == [0, 0], ended
    expected = content(tmp_path / "one.zarr")
    for name in ("replicas", "ddp", "fsdp", "zero3"):
        assert content(tmp_path / f"{name}.zarr") == expected
        assert Archive(tmp_path / f"{name}.zarr").plan == Archive(tmp_path / "one.zarr").plan
        reports = [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(2)]
        assert reports[0] == reports[1]
        assert reports[0]["rows"] == Archive(tmp_path / "one.zarr").n_rows
        assert len(reports[0]["workers"]) == 2
    record(TINY["llama"](), tmp_path / "recorded.zarr", "resid_post.*,q.1,final")
    for path in sorted(tmp_path.glob("*.recorded.*.zarr")):
        assert content(path) == content(tmp_path / "recorded.zarr"), "each replica its own, bit for bit"
    assert len(list(tmp_path.glob("*.recorded.*.zarr"))) == 4
    for name, layout in {"fsdp": "fsdp2", "zero3": "zero3"}.items():
        provenance = Archive(tmp_path / f"{name}.zarr").provenance["model"]
        assert isinstance(provenance, dict)
        assert provenance["layout"] == layout
