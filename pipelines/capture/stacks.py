"""The captures of several stacks of one model: a pass for each, into a folder that holds an archive of each."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from residua.capture.recording.stats import total
from residua.capture.runtime.wrappers import evaluating, running_uncompiled
from residua.pipelines.capture.dataset_job import CaptureRequest, DatasetCapture
from residua.pipelines.capture.job import RAN_UNCOMPILED
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.data.dataset import DatasetReport
from residua.pipelines.jobs.workers import WorkerFigures, Workers, working_together
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.read.stacks import open_written
from residua.store.sealing.losses import loss_notes
from residua.store.storage.place import ResultPlace


def refuse_split(settings: CaptureSettings, tensor_parallel: object, models: str) -> None:
    """Raise PlanError for a model that several processes hold together; `models` are those of its kind, in words."""
    if tensor_parallel is not None or settings.tp * settings.pp > 1 or not settings.gather:
        raise PlanError(
            f"{models} are captured by processes that each hold all of the model: leave {named('tp')}, "
            f"{named('pp')}, {named('gather', False)} and tensor_parallel out; several processes still share the shards"
        )


def run_stacks(
    model: PreTrainedModel,
    place: ResultPlace,
    jobs: Iterable[tuple[str, DatasetCapture]],
    request: CaptureRequest,
) -> CaptureResult:
    """Run the job of each stack, one after another; every worker calls this.

    Args:
        model: The model, which runs in evaluation mode and uncompiled.
        place: Where the archives are: a folder, here or in a bucket.
        jobs: Stacks and their jobs. Each is taken when those before it have ended.
        request: What was asked for.

    Returns:
        The archives opened as one, what the first job read of the dataset, and the figures of all.
    """
    figures, resumed, reports, notes = list[WorkerFigures](), list[bool](), list[DatasetReport](), [*place.notes]
    with running_uncompiled(model) as was_compiled, evaluating(model):
        if was_compiled:
            notes.append(RAN_UNCOMPILED)
        for name, job in jobs:
            with working_together(job.out, request.settings, job=name) as membership:
                found, shared = job.run(Workers(membership), request.on_plan, request.on_batch)
            figures += found
            resumed.append(shared["resumed"])
            reports.append(DatasetReport(**shared["dataset"]))
            notes += [*job.notes, *reports[-1].notes(), *loss_notes(job.archive.plan, job.archive.commits)]
    return CaptureResult(
        archive=open_written(place.out),
        dataset=reports[0],
        stats=total([worker.stats for worker in figures]),
        workers=tuple(figures),
        resumed=any(resumed),
        notes=tuple(dict.fromkeys(notes)),
    )
