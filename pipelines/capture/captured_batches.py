"""The captured batches of an archive, to run again: all of them, or a random sample, and not those of a replay."""

import numpy as np

from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.base.naming import named
from residua.store.examples.schedule import Batch, Schedule
from residua.store.read.archive import Archive

_BATCH_TOKENS = 8192  # for an archive from a user's own loop, which does not record its batches


def schedule_of(archive: Archive) -> Schedule:
    """Return the schedule of an archive's plan; for an archive from a user's own loop, one made here."""
    plan = archive.plan
    index = archive.example_table.index()
    return Schedule(index, rows_per_shard=plan.group_rows, batch_tokens=plan.batch_tokens or _BATCH_TOKENS)


def captured_groups(archive: Archive, schedule: Schedule) -> list[int]:
    """Return the groups of examples whose rows are all captured; DamagedArchiveError if shards are lost."""
    height = archive.plan.group_rows
    captured = {
        group for first, stop in archive.captured_rows() for group in range(first // height, -(-stop // height))
    }
    return [s for s in sorted(captured) if all(t in captured for t in range(s, schedule.reach(s) + 1))]


def sample_batches(archive: Archive, n_batches: int, seed: int) -> list[Batch]:
    """Return `n_batches` captured batches, or all if there are fewer, chosen at random, in order.

    Raises:
        PlanError: `n_batches` is less than one.
        NotCapturedError: No batch is captured yet.
    """
    if n_batches < 1:
        raise PlanError(f"{named('n_batches', n_batches)}: at least one has to run")
    schedule = schedule_of(archive)
    batches = [batch for group in captured_groups(archive, schedule) for batch in schedule.batches(group)]
    if not batches:
        raise NotCapturedError(f"{archive.place} has no captured batch yet: run the capture first")
    chosen = np.random.default_rng(seed).permutation(len(batches))[:n_batches]
    return [batches[index] for index in sorted(chosen.tolist())]


def refuse_replay(archive: Archive, job: str) -> None:
    """Raise PlanError if the archive was captured during a replay, which `job` would compare with the plain model."""
    if archive.plan.is_replay:
        raise PlanError(
            f"{archive.place} was captured during a replay: its rows are not what the model computes by itself, so "
            f"{job} has nothing to compare them with. Its provenance says what to replay: residua info"
        )
