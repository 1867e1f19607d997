"""A rank dies in a user's own loop: the other does not hang, and what was committed is right.

`test_model_parallel_capture.py` compares full loops with one process.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from residua.store.read.archive import Archive
from residua.store.read.verify import verify
from tests.distributed.model_parallel.recorder_loop import KILLED_SITES, SHARDS_OF_FIRST, record
from tests.distributed.workers.forked_workers import launched
from tests.models import SPLIT
from tests.pipelines.forking import ENVIRONMENT, ROOT

pytestmark = pytest.mark.timeout(300)
SECONDS = 200
SOON = 40.0
"""Seconds within which a rank has ended after another one died, on a busy machine."""


def test_when_one_rank_is_killed_the_other_ends_with_what_is_committed(tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.model_parallel.recorder_loop", str(out)],
            cwd=ROOT,
            env={**ENVIRONMENT, **start.env, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for start in launched([], 2)
    ]
    try:
        ranks[1].communicate(timeout=SECONDS)
        died = time.monotonic()
        _, errors = ranks[0].communicate(timeout=SOON)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert (ranks[0].returncode, ranks[1].returncode) == (1, -signal.SIGKILL), errors
    assert time.monotonic() - died < SOON
    record(SPLIT["llama"](), tmp_path / "one.zarr", KILLED_SITES)
    archive, wanted = Archive(out), Archive(tmp_path / "one.zarr")
    assert (archive.is_sealed, verify(out).problems) == (False, [])
    n_rows = archive.progress.rows
    assert n_rows % 16 == 0
    assert n_rows >= 16 * SHARDS_OF_FIRST, "whole shards, and what was committed before is there"
    for site in wanted.sites:
        ours, theirs = (np.asarray(found[site][:n_rows], np.float64) for found in (archive, wanted))
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max(), site
