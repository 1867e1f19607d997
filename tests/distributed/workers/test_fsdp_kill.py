"""FSDP2: if a rank is killed, the other ends at once, as they share each forward pass; then the run resumes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from tests.distributed.workers.forked_workers import launched
from tests.distributed.workers.user_script import capture
from tests.models import TINY
from tests.pipelines.forking import ENVIRONMENT, ROOT
from tests.stopped import check_stop, content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 200
SOON = 60.0
"""Seconds within which the other has ended; it takes one forward pass, and the end of a Python on a busy machine."""


@contextmanager
def started(out: Path, folder: Path, slow: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    words = [sys.executable, "-m", "tests.distributed.workers.fsdp_script", str(out), str(slow)]
    with ExitStack() as stack:
        ranks = []
        for rank, worker in enumerate(launched([], 2)):
            environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), **worker.env}
            log = stack.enter_context((folder / f"{rank}.log").open("wb"))
            ranks.append(stack.enter_context(subprocess.Popen(words, cwd=ROOT, env=environment, stderr=log)))
            stack.callback(ranks[-1].kill)  # one that has ended does not mind
        yield ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_ends_at_once_and_the_run_can_go_on(victim: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    capture(TINY["llama"](), tmp_path / "plain.zarr")
    out = tmp_path / "a.zarr"
    with started(out, tmp_path, 0.15) as ranks:
        deadline = time.monotonic() + SECONDS
        while len(list(out.glob("commits/*.json"))) < 3:
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "0.log").read_text()
            time.sleep(0.02)
        ranks[victim].send_signal(signal.SIGKILL)
        assert ranks[1 - victim].wait(SOON) == 1
    said = (tmp_path / f"{1 - victim}.log").read_text()
    assert "run the same command again to go on" in said, said[-2000:]
    files = check_stop(out, {})
    assert files
    with started(out, tmp_path, 0.0) as ranks:
        assert [rank.wait(SECONDS) for rank in ranks] == [0, 0]
    check_stop(out, files)
    assert content(out) == content(tmp_path / "plain.zarr")
