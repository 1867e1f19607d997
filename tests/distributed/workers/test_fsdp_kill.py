"""FSDP2: if a rank is killed, the other ends at once, as they share each forward pass; then the run resumes."""

import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.workers.user_script import capture
from tests.forking import SOON, ForkedWorkers, Start, launched
from tests.models.tiny import TINY
from tests.stopped import await_commits, check_stop, content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 200


def ranks(out: Path, slow: float) -> list[Start]:
    return launched([str(out), str(slow)], 2, module="tests.distributed.workers.fsdp_script")


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_ends_at_once_and_the_run_can_go_on(
    forked_workers: ForkedWorkers, victim: int, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    capture(TINY["llama"](), tmp_path / "plain.zarr")
    out = tmp_path / "a.zarr"
    forked_workers.start(ranks(out, 0.15))
    await_commits(out, 3)
    forked_workers.kill(victim)
    ended = forked_workers.wait(SOON)
    assert [ended[victim].code, ended[1 - victim].code] == [-signal.SIGKILL, 1], ended
    assert "run the same command again to go on" in ended[1 - victim].output, ended
    files = check_stop(out, {})
    assert files
    ended = forked_workers.run(ranks(out, 0.0), SECONDS)
    assert [end.code for end in ended] == [0, 0], ended
    check_stop(out, files)
    assert content(out) == content(tmp_path / "plain.zarr")
