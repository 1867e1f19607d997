"""What a capture did, as `residua.capture_dataset` returns it."""

from dataclasses import dataclass

from residua.capture.recording.stats import RecordStats
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.jobs.workers import WorkerFigures
from residua.store.read.archive import Archive


@dataclass(frozen=True, kw_only=True, repr=False)
class CaptureResult:
    """What a capture did.

    Attributes:
        archive: The archive, open for reading.
        dataset: What was read of the dataset, and what was cut or left out.
        stats: Figures of this run, of all workers together, without those of an earlier, interrupted run.
        workers: What each worker did.
        resumed: Whether the archive had been begun by an earlier run.
        notes: What the user should know, one sentence each.
    """

    archive: Archive
    dataset: DatasetReport
    stats: RecordStats
    workers: tuple[WorkerFigures, ...]
    resumed: bool
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        captured = f"{self.stats.rows:,} rows captured in {self.stats.seconds:.1f} s"
        return f"<CaptureResult {self.archive.place}: {captured}, {len(self.notes)} notes>"
