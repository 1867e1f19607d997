"""Whether a capture takes images, and what its model makes of them."""

from inspect import signature
from os import PathLike
from pathlib import Path

from transformers import AutoProcessor, PreTrainedModel

from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.sharded import is_sharded
from residua.capture.sites.anatomy import PIXELS, takes_pixels
from residua.pipelines.data.image_encoders import PatchEncoder, TokenEncoder
from residua.pipelines.data.image_examples import ImageDataset
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.errors import PlanError


def image_dataset(
    model: PreTrainedModel, out: Path, settings: CaptureSettings, processor: object | None
) -> ImageDataset | None:
    """Return what reads the images of a capture; None for a capture over tokens alone.

    Args:
        model: The model.
        out: Folder of the archive.
        settings: The settings of the capture.
        processor: The model's processor or image processor.

    Raises:
        PlanError: The model takes images and comes without a processor, takes none, or is held by several processes.
    """
    if not takes_pixels(model) and settings.image_column is None:
        if processor is not None:
            raise PlanError("processor is for images: name their column by image_column (--image-column) too")
        return None
    if PIXELS not in signature(model.forward).parameters:
        raise PlanError(
            f"--image-column {settings.image_column!r} is given, and {type(model).__name__} takes no images: leave it "
            "out"
        )
    if stage_model_of(model) is not None or spans_processes(model) or is_sharded(model):
        raise PlanError(
            f"{type(model).__name__} is held by several processes, and images are captured by models that one process "
            "holds: start several processes with a replica each"
        )
    if processor is None:
        raise PlanError(
            f"{type(model).__name__} takes images, and comes without an image processor: pass "
            "processor=transformers.AutoImageProcessor.from_pretrained(...), or AutoProcessor if it takes text, too"
        )
    if takes_pixels(model):
        return ImageDataset(out, PatchEncoder(model, processor), settings)
    return ImageDataset(out, TokenEncoder(model, processor, settings), settings)


def load_processor(name: str | PathLike[str], revision: str | None) -> object:
    """Load the processor of the model `name`, a hub id or a folder; no code of it is run.

    Raises:
        PlanError: It comes without one, or it cannot be loaded; the cause is chained.
    """
    try:
        return AutoProcessor.from_pretrained(name, revision=revision)  # type: ignore[no-untyped-call]  # theirs
    except Exception as error:  # whatever transformers, or a library below it, raises for a broken file
        raise PlanError(
            f"the processor of --model {name} could not be loaded, and its model takes images: {error}"
        ) from error
