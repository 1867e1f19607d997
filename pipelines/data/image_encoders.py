"""What models make of images: which positions there are, and what each of them is.

`PatchEncoder` is for models that take images alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from residua.capture.forward.example_inputs import ExampleInputs
from residua.capture.sites.anatomy import PIXELS
from residua.capture.sites.pixels import patch_grid
from residua.pipelines.data.sources import Row
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import CaptureError, DatasetError, PlanError
from residua.store.examples.index import NO_TOKEN
from residua.store.format.row_columns import IMAGE_COLUMNS, MODALITIES

IMAGE, SPECIAL = MODALITIES.index("image"), MODALITIES.index("special")


class PatchEncoder:
    """Images of a model that takes them alone: a position for each patch, with special ones around them.

    Args:
        model: The model.
        processor: Its image processor, or a processor that has one.

    Raises:
        PlanError: There is no image processor.
    """

    needs_image = True

    def __init__(self, model: PreTrainedModel, processor: object) -> None:
        self._model = model
        self._processor: Any = image_processor_of(processor)
        self._identity = processor_identity(self._processor)

    @property
    def identity(self) -> Mapping[str, Json]:
        """What the provenance says of the processor: its class, its settings and their digest."""
        return self._identity

    def text_of(self, row: Row, number: int) -> tuple[str, Sequence[str]]:  # noqa: ARG002  # such a row has none
        """Return no text."""
        return "", ()

    def encode(self, images: Sequence[Image.Image], text: str, where: str) -> ExampleInputs:  # noqa: ARG002
        """Return the pixels of an image, (1, channels, height, width), and what each position is."""
        pixels = processed(self._processor, where, images=images[0])[PIXELS]
        try:
            grid = patch_grid(self._model, tuple(pixels.shape[1:]))
        except CaptureError as error:
            raise DatasetError(f"{where}: {error}") from error
        columns = {name: np.full(grid.n_positions, -1, dtype) for name, dtype in IMAGE_COLUMNS.items()}
        columns["modality"][:] = SPECIAL
        columns["image"][:] = 0
        patches = slice(grid.first, grid.first + grid.n_rows * grid.n_columns)
        columns["modality"][patches] = IMAGE
        columns["view"][patches] = 0
        rows, places = np.divmod(np.arange(grid.n_rows * grid.n_columns), grid.n_columns)
        columns["patch_row"][patches], columns["patch_column"][patches] = rows, places
        return ExampleInputs(
            input_ids=np.full(grid.n_positions, NO_TOKEN, np.int32), tensors={PIXELS: pixels}, columns=columns
        )


def image_processor_of(processor: object) -> object:
    """Return a processor's image processor; the processor itself if it is one.

    Raises:
        PlanError: It has none.
    """
    found = getattr(processor, "image_processor", processor)
    if found is None or not hasattr(found, "preprocess"):
        raise PlanError(
            f"the model takes images, and a {type(processor).__name__} was given: pass its image processor "
            "(transformers.AutoImageProcessor) as processor"
        )
    return found


def processor_identity(processor: Any) -> dict[str, Json]:
    """Return class and settings of an image processor, and a digest of both."""
    settings = cast("dict[str, Json]", _plain(processor.to_dict()))
    entry: dict[str, Json] = {"class": type(processor).__name__, "settings": settings}
    return {**entry, "digest": digest_of(entry)}


def _plain(value: Any) -> Json:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def processed(processor: Any, where: str, **given: Any) -> dict[str, Tensor]:
    """Return the tensors that a processor makes of one example.

    Raises:
        DatasetError: It refuses what it was given.
    """
    try:
        found = processor(**given, return_tensors="pt")
    except Exception as error:  # the boundary to the processor, which may raise anything
        raise DatasetError(
            f"{where}: {type(processor).__name__} refuses it: {type(error).__name__}: {error}"
        ) from error
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
