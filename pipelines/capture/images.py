"""Whether a capture takes images, and what its model makes of them."""

from collections.abc import Collection
from inspect import signature
from os import PathLike
from pathlib import Path

from transformers import AutoProcessor, PreTrainedModel

from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.pipeline_schedule import stage_model_of
from residua.capture.runtime.sharded import is_sharded
from residua.capture.sites.anatomy import PIXELS, takes_pixels
from residua.capture.sites.towers import NAMES, Tower, towers_of
from residua.pipelines.data.missing_files import to_give
from residua.pipelines.images.encoders import PatchEncoder, TokenEncoder
from residua.pipelines.images.examples import ImageDataset
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import PlanError
from residua.store.base.naming import named


def image_dataset(
    model: PreTrainedModel,
    out: Path,
    settings: CaptureSettings,
    processor: object | None,
    rows: Collection[int] | None = None,
) -> ImageDataset | None:
    """Return what reads the images of a capture; None for a capture over tokens alone.

    Args:
        model: The model.
        out: Folder of the archive.
        settings: The settings of the capture.
        processor: The model's processor or image processor.
        rows: The rows of the dataset to read, by number; None for all.

    Raises:
        PlanError: The model takes images and comes without a processor, takes none, or is held by several processes.
    """
    if not takes_pixels(model) and settings.image_column is None:
        if processor is not None:
            raise PlanError(f"{named('processor')} is for images: name their column by {named('image_column')} too")
        return None
    if not takes_pixels(model) and PIXELS not in signature(model.forward).parameters:
        raise PlanError(
            f"{named('image_column', settings.image_column)} is given, and {type(model).__name__} takes no images: "
            "leave it out"
        )
    if stage_model_of(model) is not None or spans_processes(model) or is_sharded(model):
        raise PlanError(
            f"{type(model).__name__} is held by several processes, and images are captured by models that one process "
            "holds: start several processes with a replica each"
        )
    if processor is None:
        raise PlanError(
            f"{type(model).__name__} takes images, and comes without an image processor: "
            f"{to_give('processor', 'AutoImageProcessor')}, or AutoProcessor if it takes text, too"
        )
    if takes_pixels(model):
        return ImageDataset(out, PatchEncoder(model, processor), settings, rows)
    return ImageDataset(out, TokenEncoder(model, processor, settings), settings)


def part_to_capture(model: PreTrainedModel, sites: str) -> tuple[PreTrainedModel, str]:
    """Return the part of a model that runs for a capture, and what a reader of the archive should know of it.

    Sites of a vision tower have rows of patches, and those of CLIP's text model rows of its own tokens: the part runs
    alone. All others run the model itself.
    """
    words = [word.strip() for word in sites.split(",")]
    asked = [name for name in NAMES if any(word.startswith(f"{name}.") for word in words)]
    tower = towers_of(model).get(asked[0]) if asked else None
    return (model, "") if tower is None else (tower.module, ran_alone(model, tower))


def ran_alone(model: PreTrainedModel, part: Tower) -> str:
    """Return what a reader of the archive of a part should know; nothing for the model itself."""
    if not part.path:
        return ""
    return f"the model is {part.path} ({type(part.module).__name__}) of {type(model).__name__}, which ran alone"


def load_processor(name: str | PathLike[str], revision: str | None) -> object:
    """Load the processor of the model `name`, a hub id or a folder; no code of it is run.

    Raises:
        PlanError: It comes without one, or it cannot be loaded; the cause is chained.
    """
    try:
        return AutoProcessor.from_pretrained(name, revision=revision)  # type: ignore[no-untyped-call]  # theirs
    except Exception as error:  # whatever transformers, or a library below it, raises for a broken file
        raise PlanError(
            f"the processor of {named('model', name)} could not be loaded, and its model takes images: "
            f"{to_give('processor', 'AutoProcessor')}. transformers says: {error}"
        ) from error
