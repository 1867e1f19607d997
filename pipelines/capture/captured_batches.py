"""The batches of an archive that are wholly captured: all of them, or a sample."""

import numpy as np

from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.examples.schedule import Batch, Schedule
from residua.store.read.archive import Archive

_BATCH_TOKENS = 8192  # of an archive from a user's own loop, whose batches are not known


def schedule_of(archive: Archive) -> Schedule:
    """Return the schedule of an archive's plan; one made up, where a user's own loop had none."""
    plan = archive.plan
    index = archive.example_table.index()
    return Schedule(index, rows_per_shard=plan.rows_per_shard, batch_tokens=plan.batch_tokens or _BATCH_TOKENS)


def whole_groups(archive: Archive, schedule: Schedule) -> list[int]:
    """Return the groups whose rows are all captured."""
    commits = archive.commits
    return [s for s in sorted(commits) if all(t in commits for t in range(s, schedule.reach(s) + 1))]


def sample_batches(archive: Archive, n_batches: int, seed: int) -> list[Batch]:
    """Return some captured batches, chosen at random, in order.

    Raises:
        PlanError: Fewer than one was asked for.
        NotCapturedError: There are none yet.
    """
    if n_batches < 1:
        raise PlanError(f"--batches {n_batches}: at least one has to run")
    schedule = schedule_of(archive)
    batches = [batch for group in whole_groups(archive, schedule) for batch in schedule.batches(group)]
    if not batches:
        raise NotCapturedError(f"{archive.path} has no captured batch yet: run the capture first")
    chosen = np.random.default_rng(seed).permutation(len(batches))[:n_batches]
    return [batches[index] for index in sorted(chosen.tolist())]
