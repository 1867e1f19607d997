"""A rank dies in a user's own loop: the other does not hang, and what was committed is right.

`test_capture.py` compares full loops with one process.
"""

import signal
from pathlib import Path

import numpy as np
import pytest

from residua.store.read.archive import Archive
from residua.store.verification.verify import verify
from tests.distributed.model_parallel.recorder_loop import KILLED_SITES, SHARDS_OF_FIRST, record
from tests.forking import SOON, ForkedWorkers, launched
from tests.models.tiny import SPLIT
from tests.stopped import await_commits

pytestmark = pytest.mark.timeout(300)


def test_when_one_rank_is_killed_the_other_ends_with_what_is_committed(
    forked_workers: ForkedWorkers, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    forked_workers.start(launched([str(out)], 2, module="tests.distributed.model_parallel.recorder_loop"))
    await_commits(out, SHARDS_OF_FIRST)
    ended = forked_workers.wait(SOON)
    assert [end.code for end in ended] == [1, -signal.SIGKILL], ended
    record(SPLIT["llama"](), tmp_path / "one.zarr", KILLED_SITES)
    archive, wanted = Archive(out), Archive(tmp_path / "one.zarr")
    assert (archive.is_sealed, verify(out).problems) == (False, [])
    n_rows = archive.progress.rows
    assert n_rows % 16 == 0
    assert n_rows >= 16 * SHARDS_OF_FIRST, "whole shards, and what was committed before is there"
    for site in wanted.sites:
        ours, theirs = (np.asarray(found[site][:n_rows], np.float64) for found in (archive, wanted))
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max(), site
