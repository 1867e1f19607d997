"""`residua.replay`: stored or edited activations back into the model, for some examples of an archive.

    with residua.replay(model, "acts.zarr", examples=[3], at="resid_post.5", edits=[...]) as run:
        run.logits          # per example, (tokens, vocabulary)
        run["resid_post.7"] # per example, (rows, width)

The stored rows go in at ``at``, the edits apply, and only the blocks above run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from residua.capture.identity.provenance import running_as_captured
from residua.capture.replay.engine import Replayer
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model
from residua.capture.runtime.process_groups import declared_group
from residua.pipelines.images.replayed import replayed_images
from residua.pipelines.runs.result import Run
from residua.pipelines.runs.texts import Texts
from residua.store.edits.parser import EditSource, parse_edits
from residua.store.read.archive import Archive
from residua.store.read.stacks import archives_of, main_archive, open_archive


@contextmanager
def replay(
    model: nn.Module | PipelineScheduleSingle,
    archive: Archive | str | PathLike[str],
    *,
    examples: Sequence[int],
    at: str | Iterable[str] | None = None,
    edits: EditSource = (),
    keep: str | Iterable[str] = (),
    grad: bool = False,
    force: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    images: Sequence[object] | None = None,
    processor: object | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[Run]:
    """Put stored rows of some examples back into the model, edit, and run only the layers above.

    The examples run in one batch, padded and numbered as in the capture; one by one if padding changes the model's
    rows, which a note says. Without edits, logits and later sites equal
    the captured ones bit for bit if the examples are a batch of the plan, the rows are stored without loss, and dtype,
    attention implementation and threads are those of the capture; `notes` says what differs.

    If several processes hold the model, all of them make the same replay; see `residua.tap`.

    Args:
        model: The model that was captured; it may be wrapped and spread over processes. Or the schedule of a torch
            pipeline, GPipe or 1F1B, whose stages hold the model: they run its forward passes, and every stage returns
            the logits.
        archive: The archive, or its folder. Of an encoder-decoder the folder of both stacks, or of one of them; see
            docs/encoder-decoder.md.
        examples: Numbers of examples.
        at: Where stored rows go in: one or more sites. Below a site of the residual stream nothing is computed. None
            puts no rows in and runs the model in full.
        edits: Edits in order, as `residua.store.edits.edit` lists them: dictionaries, or a YAML or JSON file.
        keep: Sites that the first pass keeps; each other one costs a pass when it is asked for.
        grad: Run with gradients, for ``run.gradients``. Logits and kept rows are then part of autograd's graph; the
            gradients of the parameters stay untouched.
        force: Accept a model that is not the captured one, and note it.
        inputs: What the examples ran with beside tokens and mask and the archive does not keep, such as
            ``pixel_values``: tensors by name, for `examples` in their order. The model then numbers positions itself,
            unless ``position_ids`` are among them.
        images: Of a vision-language model the images that the examples were captured with: for each example a list (PIL
            images, arrays of pixels, bytes or paths of files), or one image, or None. They are compared with those of
            the capture.
        processor: The model's processor, for `images`.
        tensor_parallel: The ranks over which activations are split, if the model does not show them.

    Yields:
        The replay.

    Raises:
        PlanError: An edit does not fit, rows do not exist, or the model, an image or the processor is another one. The
            model has not run.
        UnknownSiteError: The model or the archive does not have a site.
        NotCapturedError: Rows are not captured yet.

    Example:
        >>> with residua.replay(model, "acts.zarr", examples=[0], at="resid_post.3") as run:  # doctest: +SKIP
        ...     run.logits[0].shape
    """
    opened = open_archive(archive)
    parsed = parse_edits(edits)
    with ExitStack() as stack:
        if isinstance(model, PIPELINE_TYPES):
            model = stack.enter_context(as_model(model))
        stack.enter_context(declared_group(model, tensor_parallel))
        for one in archives_of(opened):
            stack.enter_context(running_as_captured(one, model))
        if images is not None:
            inputs = {**replayed_images(main_archive(opened), model, examples, images, processor), **(inputs or {})}
        replayer = Replayer(
            model, opened, at=at, edits=parsed, force=force, inputs=inputs, tensor_parallel=tensor_parallel
        )
        run = Run(
            replayer,
            examples,
            [keep] if isinstance(keep, str) else list(keep),
            grad=grad,
            texts=Texts(main_archive(opened).tokenizer, opened.place),
        )
        stack.callback(run.close)
        yield run
