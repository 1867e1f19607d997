"""What models make of images: which positions there are, and what each of them is.

`PatchEncoder` is for models that take images alone. `TokenEncoder` is for those that take images with text: their
processor puts tokens into the text that stand for patches, and the model puts what its tower makes of an image there.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from math import isqrt, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from residua.capture.forward.example_inputs import ExampleInputs
from residua.capture.sites.anatomy import PIXELS
from residua.capture.sites.pixels import grid_of, is_cut, patch_grid, patch_order, views_of
from residua.capture.sites.towers import image_token_of
from residua.pipelines.data.chats import given_fields, message_of, naming_row
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.missing_files import to_give
from residua.pipelines.data.sources import Row
from residua.pipelines.data.tokenizer import special_ids
from residua.store.base.canonical import Json, as_json, digest_of
from residua.store.base.errors import CaptureError, DatasetError, PlanError
from residua.store.base.naming import named
from residua.store.examples.index import NO_TOKEN
from residua.store.format.row_columns import IMAGE_COLUMNS, MODALITIES

TEXT, IMAGE, SPECIAL = range(len(MODALITIES))
Numbers = npt.NDArray[np.int64]

_IMAGE_AXES = 3
_REPLACED = "text_replacement_offsets"
_OF_TEXT = ("input_ids", "attention_mask", "position_ids", "labels")


class PatchEncoder:
    """Images of a model that takes them alone: a position for each patch, with special ones around them.

    Where the processor makes several views of an image, each is an example.

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
        self._cuts: dict[tuple[int, int], tuple[Numbers, Numbers]] = {}  # where patches lie, by rows and columns

    @property
    def identity(self) -> Mapping[str, Json]:
        """What the provenance says of the processor: its class, its settings and their digest."""
        return self._identity

    def text_of(self, row: Row, number: int) -> tuple[str, Sequence[str]]:  # noqa: ARG002  # such a row has none
        """Return no text."""
        return "", ()

    def encode(self, images: Sequence[Image.Image], text: str, where: str) -> list[ExampleInputs]:  # noqa: ARG002
        """Return each view of an image as the model takes it, and what each position is."""
        try:
            views = views_of(self._model, processed(self._processor, where, images=images[0]))
            return [self._view(inputs, number, images[0], where) for number, inputs in enumerate(views)]
        except CaptureError as error:
            raise DatasetError(f"{where}: {error}") from error

    def _view(self, inputs: Mapping[str, Tensor], number: int, image: Image.Image, where: str) -> ExampleInputs:
        places = self._places(inputs, number, image, where)
        n_positions = len(places["patch_row"])
        columns = {name: np.full(n_positions, -1, dtype) for name, dtype in IMAGE_COLUMNS.items()}
        patches = places.pop("is_patch") != 0
        columns["modality"][:] = np.where(patches, IMAGE, SPECIAL)
        columns["image"][:], columns["view"][:] = 0, number
        for name, values in places.items():
            columns[name][:] = values
        return ExampleInputs(input_ids=np.full(n_positions, NO_TOKEN, np.int32), tensors=inputs, columns=columns)

    def _places(self, inputs: Mapping[str, Tensor], view: int, image: Image.Image, where: str) -> dict[str, Any]:
        """Return which positions are patches, and where these lie in the image; -1 for what has no place."""
        if not is_cut(self._model):
            grid = patch_grid(self._model, tuple(inputs[PIXELS].shape[1:]))
            numbers = np.arange(grid.n_positions) - grid.first
            is_patch = (numbers >= 0) & (numbers < grid.n_rows * grid.n_columns)
            rows, columns = np.divmod(numbers, grid.n_columns)
            rows, columns = np.where(is_patch, rows, -1), np.where(is_patch, columns, -1)
            return {"is_patch": is_patch, "patch_row": rows, "patch_column": columns}
        order, cut = patch_order(self._model, inputs), grid_of(inputs)
        if cut not in self._cuts:
            self._cuts[cut] = self._cut_by_processor(cut, view, image, where)
        rows, columns = (np.where(order < 0, -1, of_patches[order]) for of_patches in self._cuts[cut])
        return {"is_patch": order >= 0, "patch_row": rows, "patch_column": columns}

    def _cut_by_processor(
        self, grid: tuple[int, int], view: int, image: Image.Image, where: str
    ) -> tuple[Numbers, Numbers]:
        """Return row and column of each patch that the processor cuts, in its order; -1 where they are not known.

        It cuts two images of the same size that grow brighter, one from the top to the bottom and one from the left to
        the right: so patches of one row, or of one column, are alike, and the brighter ones lie behind.
        """
        width, height = image.size
        down, across = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None, :]
        ranks = []
        for values, n in zip((down, across), grid, strict=True):
            grey = np.broadcast_to(values.round().astype(np.uint8), (height, width))
            made = processed(self._processor, where, images=Image.fromarray(grey).convert("RGB"))
            patches = views_of(self._model, made)[view][PIXELS][0]
            ranks.append(_ranks(patches.double().flatten(1).mean(1).numpy(), n))
        rows, columns = ranks
        if rows is None or columns is None or len(set(zip(rows, columns, strict=True))) != prod(grid):
            nowhere = np.full(prod(grid), -1)
            return nowhere, nowhere
        return rows, columns


class TokenEncoder:
    """Text with images: the tokens of a vision-language model, some of which stand for patches.

    Args:
        model: The model.
        processor: Its processor, which has a tokenizer and an image processor.
        settings: The column with the text or the chat, and how it becomes tokens.

    Raises:
        PlanError: The processor takes no text, or it is not known which token stands for a patch.
    """

    needs_image = False

    def __init__(self, model: PreTrainedModel, processor: object, settings: DatasetSettings) -> None:
        self._processor: Any = processor
        self._settings = settings
        self._tokenizer: Any = getattr(processor, "tokenizer", None)
        self._names = set(signature(model.forward).parameters) - set(_OF_TEXT)
        if self._tokenizer is None or not hasattr(processor, "image_processor"):
            raise PlanError(
                f"{type(model).__name__} takes images with text, and comes with a {type(processor).__name__}, which "
                f"is no processor of both: {to_give('processor', 'AutoProcessor')}"
            )
        token = image_token_of(model)
        if token is None:
            raise PlanError(
                f"the config of {type(model).__name__} does not say which token stands for a patch (image_token_id), "
                f"so rows of images cannot be told from those of text: leave {named('image_column')} out"
            )
        self._image_token = token
        self._special = np.array(sorted(special_ids(self._tokenizer)), np.int64)
        self._vision = getattr(model.config, "vision_config", None)
        self._identity = processor_identity(processor)

    @property
    def identity(self) -> Mapping[str, Json]:
        """What the provenance says of the processor: its class, its settings and their digest."""
        return self._identity

    def text_of(self, row: Row, number: int) -> tuple[str, Sequence[str]]:
        """Return the text of a row, or its chat rendered by the chat template, and its column.

        Raises:
            DatasetError: There is neither, or the chat cannot be rendered.
        """
        asked = self._settings.text_column
        column = asked or next((name for name in ("messages", "text") if row.get(name) is not None), None)
        if column is None or column not in row:
            raise DatasetError(
                f"row {number}: there is no column {asked or 'text or messages'}; the row has {', '.join(row)}; name "
                f"one with {named('text_column')}"
            )
        value = row[column]
        if isinstance(value, list | tuple) and value:
            return self._rendered(value, f"row {number}, column {column!r}"), (column,)
        if not isinstance(value, str | None):
            raise DatasetError(f"row {number}: column {column!r} should hold a text or a chat, found {value!r:.80}")
        if value is not None and self._settings.chat_settings:
            raise DatasetError(f"{self._settings.chat_settings[0]} is for chats, and column {column!r} holds texts")
        return value or "", (column,)

    def _rendered(self, chat: Sequence[object], where: str) -> str:
        if self._settings.tools_column:
            raise DatasetError(f"{named('tools', self._settings.tools_column)}: with images, give the tools themselves")
        template = self._settings.template or getattr(self._processor, "chat_template", None)
        template = template or getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise DatasetError(
                f"{where}: there is a chat, and the processor has no chat template ({named('chat_template')})"
            )
        messages = [_message(message, where) for message in chat]
        with naming_row(where):
            return str(
                self._processor.apply_chat_template(
                    messages,
                    chat_template=template,
                    tools=self._settings.given_tools,
                    add_generation_prompt=self._settings.add_generation_prompt,
                    tokenize=False,
                    **self._settings.template_arguments,
                )
            )

    def encode(self, images: Sequence[Image.Image], text: str, where: str) -> list[ExampleInputs]:
        """Return one example: the tokens, with those that stand for patches, and the processor's other tensors.

        Raises:
            DatasetError: The processor refuses text and images, or the text has no place for the images.
        """
        given: dict[str, Any] = {"text": [text], "add_special_tokens": self._adds_special(text)}
        if images:
            given |= {"images": [list(images)], "return_text_replacement_offsets": True}
        found = processed(self._processor, where, **given)
        input_ids = found["input_ids"][0].numpy().astype(np.int32)
        is_patch = input_ids == self._image_token
        if bool(images) != bool(is_patch.any()):
            raise DatasetError(
                f"{where}: the example has {len(images)} images and {is_patch.sum()} tokens that stand for patches: "
                f"write {getattr(self._processor, 'image_token', 'the image token')!r} into the text, or a part "
                '{"type": "image"} into the chat, for each image'
            )
        tensors = {name: tensor for name, tensor in found.items() if name in self._names}
        modality = np.where(is_patch, IMAGE, np.where(np.isin(input_ids, self._special), SPECIAL, TEXT))
        columns = {name: np.full(input_ids.size, -1, dtype) for name, dtype in IMAGE_COLUMNS.items()}
        columns["modality"] = modality.astype(np.int8)
        _place(columns, np.flatnonzero(is_patch), self._n_tokens(found, len(images)), self._grids(found))
        return [ExampleInputs(input_ids=input_ids, tensors=tensors, columns=columns)]

    def _adds_special(self, text: str) -> bool:
        if self._settings.add_special_tokens is not None:
            return self._settings.add_special_tokens
        start = getattr(self._tokenizer, "bos_token", None)
        return not (start and text.startswith(start))

    def _n_tokens(self, found: Mapping[str, Any], n_images: int) -> list[int] | None:
        """Return how many tokens stand for each image; None if that is not known."""
        if n_images == 1:
            return [int((found["input_ids"] == self._image_token).sum())]
        word = self._tokenizer.convert_ids_to_tokens(self._image_token)
        offsets = found.get(_REPLACED)
        return None if not offsets else [str(it["replacement"]).count(word) for it in offsets[0]]

    def _grids(self, found: Mapping[str, Any]) -> "list[tuple[int, int]] | int":
        """Return rows and columns of each image; or the number of its square views; 0 if neither is known."""
        grids, merged = found.get("image_grid_thw"), getattr(self._vision, "spatial_merge_size", None)
        if isinstance(grids, Tensor):
            side = int(merged if merged is not None else self._processor.image_processor.merge_size)
            return [(height // side, width // side) for _, height, width in grids.tolist()]
        pixels = found.get(PIXELS)
        if not isinstance(pixels, Tensor) or pixels.ndim < _IMAGE_AXES + 1 or "image_sizes" in found:
            return 0
        return prod(pixels.shape[:-_IMAGE_AXES]) if pixels.shape[-1] == pixels.shape[-2] else 0


def _ranks(values: npt.NDArray[np.float64], n: int) -> Numbers | None:
    """Return the rank of each value among `n` different ones; None if there are not so many, clearly apart."""
    if n == 1:
        return np.zeros(len(values), np.int64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    steps = np.diff(ordered) > (ordered[-1] - ordered[0]) / n / 4
    ranks = np.zeros(len(values), np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(steps)])
    return ranks if ranks.max() == n - 1 else None


def _message(message: object, where: str) -> dict[str, object]:
    """Return a message with parts of text and places of images only, without what Arrow filled with None."""
    kept = message_of(message, where)
    content = kept.get("content")
    if not isinstance(content, list | tuple):
        return {**kept, "content": [{"type": "text", "text": content or ""}]}
    parts = [given_fields(part) if isinstance(part, Mapping) else {} for part in content]
    for part in parts:
        if part.get("type") not in ("text", "image") or (part["type"] == "image" and len(part) > 1):
            raise DatasetError(
                f'{where}: a part of a message is {{"type": "text", "text": ...}} or {{"type": "image"}}, and the '
                f"images are in the image column; found {part!r:.80}"
            )
    return {**kept, "content": parts}


def _place(
    columns: Mapping[str, Any],
    patches: "np.ndarray[Any, np.dtype[np.int64]]",
    n_tokens: Sequence[int] | None,
    grids: Sequence[tuple[int, int]] | int,
) -> None:
    """Write image, view, row and column of each patch, as far as they are known."""
    if n_tokens is None or sum(n_tokens) != len(patches):
        return
    ends = np.cumsum(n_tokens)
    images = np.split(patches, ends[:-1])
    views = [np.split(each, np.flatnonzero(np.diff(each) != 1) + 1) for each in images]
    for number, image in enumerate(images):
        columns["image"][image] = number
        for view, run in enumerate(views[number]):
            columns["view"][run] = view
    if isinstance(grids, int):
        sides = [[isqrt(len(run)) for run in image] for image in views]
        shapes = [[(side, side) for side in image] for image in sides] if sum(map(len, views)) == grids else []
    else:
        shapes = [[grid] for grid in grids] if all(len(image) == 1 for image in views) else []
    for image_views, image_shapes in zip(views, shapes, strict=False):
        for run, (n_rows, n_columns) in zip(image_views, image_shapes, strict=True):
            if n_rows * n_columns == len(run):
                columns["patch_row"][run], columns["patch_column"][run] = np.divmod(np.arange(len(run)), n_columns)


def image_processor_of(processor: object) -> object:
    """Return a processor's image processor; the processor itself if it is one.

    Raises:
        PlanError: It has none.
    """
    found = getattr(processor, "image_processor", processor)
    if found is None or not hasattr(found, "preprocess"):
        raise PlanError(
            f"the model takes images, and comes with a {type(processor).__name__}, which is no image processor: "
            f"{to_give('processor', 'AutoImageProcessor')}"
        )
    return found


def processor_identity(processor: Any) -> dict[str, Json]:
    """Return class and settings of a processor or image processor, a digest of both, and the version of Pillow."""
    settings = as_json(processor.to_dict())
    entry: dict[str, Json] = {
        "class": type(processor).__name__,
        "image_processor": type(image_processor_of(processor)).__name__,  # it differs with and without torchvision
        "settings": settings,
    }
    return {**entry, "digest": digest_of(entry), "pillow": PIL.__version__}


def processed(processor: Any, where: str, **given: Any) -> dict[str, Any]:
    """Return what a processor makes of one example: tensors, and where it put text, if that was asked.

    Raises:
        DatasetError: It refuses what it was given.
    """
    try:
        found = processor(**given)
        replaced = found.pop(_REPLACED, None)
        found.convert_to_tensors("pt")
    except Exception as error:  # the boundary to the processor, which may raise anything
        raise DatasetError(
            f"{where}: {type(processor).__name__} refuses it: {type(error).__name__}: {error}"
        ) from error
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    return tensors if replaced is None else {**tensors, _REPLACED: replaced}
