"""The captures of several stacks of one model: a pass for each, into a folder that holds an archive of each."""

from collections.abc import Callable, Iterable, Sequence

from residua.capture.recording.stats import RecordStats, total
from residua.pipelines.capture.dataset_job import DatasetCapture
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.jobs.workers import WorkerFigures, Workers, working_together
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.format.plan import Plan
from residua.store.read.stacks import open_written
from residua.store.sealing.losses import loss_notes
from residua.store.storage.destination import Destination


def run_stacks(
    out: Destination,
    jobs: Iterable[tuple[str, DatasetCapture]],
    settings: CaptureSettings,
    on_plan: Callable[[Plan, int], None],
    on_batch: Callable[[RecordStats], None],
    notes: Sequence[str],
) -> CaptureResult:
    """Run the job of each stack, one after another; every worker calls this.

    Args:
        out: Where the archives are: a folder, here or in a bucket.
        jobs: Stacks and their jobs. Each is taken when those before it have ended.
        settings: The settings of the capture.
        on_plan: As for `capture_dataset`, for each stack.
        on_batch: The same.
        notes: What is known already.

    Returns:
        The archives opened as one, what the first job read of the dataset, and the figures of all.
    """
    figures, resumed, reports, told = list[WorkerFigures](), list[bool](), list[DatasetReport](), list(notes)
    for name, job in jobs:
        with working_together(job.out, settings, job=name) as membership:
            found, shared = job.run(Workers(membership), on_plan, on_batch)
        figures += found
        resumed.append(shared["resumed"])
        reports.append(DatasetReport(**shared["dataset"]))
        told += [*job.notes, *reports[-1].notes(), *loss_notes(job.archive.plan, job.archive.commits)]
    return CaptureResult(
        archive=open_written(out),
        dataset=reports[0],
        stats=total([worker.stats for worker in figures]),
        workers=tuple(figures),
        resumed=any(resumed),
        notes=tuple(dict.fromkeys(told)),
    )
