"""Ranks of one launch meet for the jobs that all of them run, whatever some of them ran before."""

from collections import Counter
from pathlib import Path

import pytest

from residua.capture.scheduling.membership import Launch
from residua.pipelines.jobs import rendezvous as module

Job = tuple[str | None, str]


def prefixes(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return where a fresh process meets others for each of some jobs."""
    monkeypatch.setattr(module, "_jobs", Counter())
    used: list[str] = []

    def launched(job: str) -> tuple[Launch | None, None]:
        used.append(module._prefix(job))
        return None, None

    monkeypatch.setattr(module, "_launch", launched)
    for out, job in jobs:
        with module.rendezvous(None if out is None else Path(out), join=False, job=job):
            pass
    return used


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("a.zarr", ""), ("b.zarr", "")], [("b.zarr", "")]),
        ([(None, "fidelity a.zarr"), ("b.zarr", "replay")], [("b.zarr", "replay")]),
        ([(None, "fidelity a.zarr"), (None, "fidelity b.zarr")], [(None, "fidelity b.zarr")]),
        ([("b.zarr", ""), ("b.zarr", "replay")], [("b.zarr", "replay")]),
    ],
)
def test_a_job_of_one_rank_alone_does_not_mix_up_the_next(
    first: list[Job], second: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prefixes(first, monkeypatch)[-1] == prefixes(second, monkeypatch)[-1]
    assert len(set(prefixes([*first, *first], monkeypatch))) == 2 * len(first), "and each job has keys of its own"
