"""Worker groups: the workers that hold one replica run the same batches, and each writes its own files of every shard.

The leader takes runs of shards for the group, and publishes them in the workers' store. A worker that has written its
files of a shard reports their sizes and checksums to the leader. When all reports of a shard are there, the leader
publishes the one commit record of the shard. So an archive does not show how many ranks wrote a shard, and a shard is
never half committed.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from residua.capture.scheduling.membership import EXIT_GRACE_SECONDS, Membership
from residua.capture.scheduling.work_queue import Run
from residua.store.base.errors import CaptureError
from residua.store.format.commits import Commit, commit_from_json
from residua.store.format.plan import Plan
from residua.store.format.writer import ShardWriter

_POLL_SECONDS = 0.005
_POLLS = 20  # before the model's thread looks at its writer again


class WorkerGroup:
    """The workers that hold one replica, as one of them sees them.

    Args:
        membership: This worker's membership in the job.
        numbers: Numbers of the workers that hold this replica, the leader's first, this worker's among them.

    Attributes:
        numbers: As given.
    """

    def __init__(self, membership: Membership, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self._membership = membership
        self._prefix = f"replica/{numbers[0]}"

    @property
    def is_leader(self) -> bool:
        """Whether this worker takes work for the group."""
        return self._membership.number == self.numbers[0]

    def in_lockstep(self, runs: Iterator[Run | None], *, waits: bool) -> Iterator[Run | None]:
        """Yield the leader's runs on every worker of the group.

        Args:
            runs: The runs that the leader takes; ignored on the other workers.
            waits: Whether None from the leader means that a run may come later. Otherwise None ends the runs.

        Raises:
            CaptureError: The leader is gone.
        """
        return self._lead(runs, waits=waits) if self.is_leader else self._follow(waits=waits)

    def _lead(self, runs: Iterator[Run | None], *, waits: bool) -> Iterator[Run | None]:
        number = 0
        for run in runs:
            if run is not None:
                shards = [run.shards.start, run.shards.stop]
                self._membership.publish(self._run(number), {"shards": shards, "committed": sorted(run.committed)})
                number += 1
            elif not waits:
                break
            yield run
        self._membership.publish(self._run(number), {})

    def _follow(self, *, waits: bool) -> Iterator[Run | None]:
        number = 0
        while True:
            message = self._membership.message(self._run(number))
            if message is None:
                self._check(self.numbers[0])
                yield from self._pause(waits=waits)
            elif not message:
                return
            else:
                number += 1
                yield Run(range(*message["shards"]), frozenset(message["committed"]))

    def _pause(self, *, waits: bool) -> Iterator[None]:
        for _ in range(_POLLS):
            time.sleep(_POLL_SECONDS)
        if waits:
            yield None

    def _run(self, number: int) -> str:
        return f"{self._prefix}/run/{number}"

    def _check(self, number: int) -> None:
        if self._membership.is_gone(number):
            raise CaptureError(
                f"{self._membership.failure_reason(number)}. It held a shard of this replica. What was finished before "
                "is safe; run the same command again to go on."
            )

    def report(self, files: Commit) -> None:
        """Report to the leader that this worker's files of a shard are on the disk."""
        self._membership.publish(self._report(files.shard, self._membership.number), files.to_json())

    def reported(self, shard: int) -> list[Commit]:
        """Return what the other workers have reported of a shard so far."""
        found = ((n, self._membership.message(self._report(shard, n))) for n in self.numbers[1:])
        return [commit_from_json(message) for _, message in found if message is not None]

    def forget(self, shard: int) -> None:
        """Delete the reports of a shard from the store."""
        for number in self.numbers[1:]:
            self._membership.drop(self._report(shard, number))

    def check_all(self) -> None:
        """Raise CaptureError if a worker of the group is gone."""
        for number in self.numbers:
            self._check(number)

    def _report(self, shard: int, number: int) -> str:
        return f"{self._prefix}/report/{shard}/{number}"


class GroupCommits:
    """Joins the workers' reports of each shard into one commit record, on the leader; other workers report to it.

    Args:
        worker_group: The workers that write the shards.
        plan: The plan, which says which arrays a shard has.
    """

    def __init__(self, worker_group: WorkerGroup, plan: Plan) -> None:
        self._worker_group = worker_group
        self._keys = {spec.key for array in plan.arrays for spec in array.file_specs}
        self._mine: dict[int, Commit] = {}
        self._lock = threading.Lock()

    def report(self, files: Commit) -> None:
        """Take the report of this worker's files of a shard; called in a writer thread."""
        if not self._worker_group.is_leader:
            self._worker_group.report(files)
            return
        with self._lock:
            self._mine[files.shard] = files

    def publish(self, writer: ShardWriter) -> bool:
        """Publish the commit records of complete shards; return whether reports of other shards are missing."""
        with self._lock:
            waiting = sorted(self._mine)
        for shard in waiting:
            arrays = dict(self._mine[shard].arrays)
            for files in self._worker_group.reported(shard):
                arrays |= files.arrays
            if arrays.keys() == self._keys:
                writer.publish(replace(self._mine[shard], arrays=dict(sorted(arrays.items()))))
                with self._lock:
                    del self._mine[shard]
                self._worker_group.forget(shard)
        return bool(self._mine)

    def finish(self, writer: ShardWriter, *, after_error: bool) -> None:
        """Publish the remaining commit records, now that this worker's files are all on the disk.

        Args:
            writer: This worker's writer.
            after_error: Whether an error ends the capture. Then shards whose reports do not arrive within
                `EXIT_GRACE_SECONDS` are left out.

        Raises:
            CaptureError: A worker of the group is gone, and its reports are missing.
        """
        deadline = time.monotonic() + EXIT_GRACE_SECONDS
        while self.publish(writer):
            if after_error and time.monotonic() > deadline:
                return
            if not after_error:
                self._worker_group.check_all()
            time.sleep(_POLL_SECONDS)
