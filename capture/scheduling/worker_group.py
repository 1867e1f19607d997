"""The workers that hold one replica together: they run the same batches, and each writes its share of every shard.

The leader takes runs of shards for all of them, and tells the others through the crew's store. Whoever has written its
files of a shard reports their sizes and checksums to the leader; when all are there, the leader publishes the one
record of the shard. So an archive does not tell how many ranks wrote a shard, and a shard is never half committed.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from residua.capture.scheduling.membership import FAREWELL_SECONDS, Crew
from residua.capture.scheduling.work_queue import Run
from residua.store.base.errors import CaptureError
from residua.store.format.commits import Commit, commit_from_json
from residua.store.format.plan import Plan
from residua.store.format.writer import ShardWriter

_POLL_SECONDS = 0.005
_POLLS = 20  # before the model's thread looks after its writer


class Team:
    """The workers of one replica, as one of them sees them.

    Args:
        crew: All workers.
        numbers: Numbers of those that hold this replica, the leader's first; this worker's is among them.

    Attributes:
        numbers: As given.
    """

    def __init__(self, crew: Crew, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self._crew = crew
        self._prefix = f"replica/{numbers[0]}"

    @property
    def is_leader(self) -> bool:
        """Whether this worker takes work for all of them."""
        return self._crew.number == self.numbers[0]

    def in_lockstep(self, runs: Iterator[Run | None], *, waits: bool) -> Iterator[Run | None]:
        """Yield the leader's runs on every worker of the team.

        Args:
            runs: What the leader takes; nobody else's are looked at.
            waits: Whether the leader's None means that there may be more later; else it is the end.

        Raises:
            CaptureError: The leader is gone.
        """
        return self._lead(runs, waits=waits) if self.is_leader else self._follow(waits=waits)

    def _lead(self, runs: Iterator[Run | None], *, waits: bool) -> Iterator[Run | None]:
        number = 0
        for run in runs:
            if run is not None:
                shards = [run.shards.start, run.shards.stop]
                self._crew.publish(self._run(number), {"shards": shards, "committed": sorted(run.committed)})
                number += 1
            elif not waits:
                break
            yield run
        self._crew.publish(self._run(number), {})

    def _follow(self, *, waits: bool) -> Iterator[Run | None]:
        number = 0
        while True:
            message = self._crew.message(self._run(number))
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
        if self._crew.is_gone(number):
            raise CaptureError(
                f"{self._crew.obituary(number)}. It held a part of this replica. What was finished before is safe; "
                "run the same command again to go on."
            )

    def report(self, part: Commit) -> None:
        """Tell the leader that this worker's files of a shard are on the disk."""
        self._crew.publish(self._part(part.shard, self._crew.number), part.to_json())

    def reported(self, shard: int) -> list[Commit]:
        """Return what the others have reported of a shard so far."""
        found = ((n, self._crew.message(self._part(shard, n))) for n in self.numbers[1:])
        return [commit_from_json(message) for _, message in found if message is not None]

    def forget(self, shard: int) -> None:
        """Let the store forget what was reported of a shard."""
        for number in self.numbers[1:]:
            self._crew.drop(self._part(shard, number))

    def check_all(self) -> None:
        """Raise CaptureError if one of the others is gone."""
        for number in self.numbers:
            self._check(number)

    def _part(self, shard: int, number: int) -> str:
        return f"{self._prefix}/part/{shard}/{number}"


class TeamCommits:
    """Brings the parts of each shard's record together, on the leader; on the others it passes theirs on.

    Args:
        team: The workers that share the shards.
        plan: The plan that says which arrays a shard has.
    """

    def __init__(self, team: Team, plan: Plan) -> None:
        self._team = team
        self._keys = {part.key for spec in plan.arrays for part in spec.parts}
        self._mine: dict[int, Commit] = {}
        self._lock = threading.Lock()

    def report(self, part: Commit) -> None:
        """Take this worker's part of a shard; called in a writer thread."""
        if not self._team.is_leader:
            self._team.report(part)
            return
        with self._lock:
            self._mine[part.shard] = part

    def publish(self, writer: ShardWriter) -> bool:
        """Publish the shards that are complete; say whether parts of some are missing still."""
        with self._lock:
            waiting = sorted(self._mine)
        for shard in waiting:
            arrays = dict(self._mine[shard].arrays)
            for part in self._team.reported(shard):
                arrays |= part.arrays
            if arrays.keys() == self._keys:
                writer.publish(replace(self._mine[shard], arrays=dict(sorted(arrays.items()))))
                with self._lock:
                    del self._mine[shard]
                self._team.forget(shard)
        return bool(self._mine)

    def finish(self, writer: ShardWriter, *, in_haste: bool) -> None:
        """Publish what is left, now that this worker's files are all on the disk.

        Args:
            writer: This worker's.
            in_haste: Whether an error is on its way; then what is not there within seconds is left out.

        Raises:
            CaptureError: One of the others is gone, and its parts are missing.
        """
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.publish(writer):
            if in_haste and time.monotonic() > deadline:
                return
            if not in_haste:
                self._team.check_all()
            time.sleep(_POLL_SECONDS)
