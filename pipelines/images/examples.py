"""Examples of a dataset with images: each row is one example, whole, whose tokens follow from its images and its text.

An `Encoder` says what a model makes of a row. The same encoder makes the rows' inputs again when a batch runs
(`ImageInputs`), from the images that the spool keeps.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from PIL import Image

from residua.capture.forward.example_inputs import OF_TOKENS, ExampleInputs
from residua.pipelines.data.dataset import SOURCE_COLUMNS, DatasetReport
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import Row, Rows, local_path, open_rows, refuse_taken, require_column
from residua.pipelines.images.images import GivenImage, given_image, open_image
from residua.pipelines.images.spool import Spool, SpoolWriter, spool_folder
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.examples.index import IMAGES, INPUT_PREFIX, OTHER_INPUTS, Example, IntArray
from residua.store.format.row_columns import MODALITIES
from residua.store.selection.positions import kept_positions, marks_of

_USUAL = ("image", "images", "img")
_SOURCE_IMAGE = "source_image"
_IMAGE, _SPECIAL = MODALITIES.index("image"), MODALITIES.index("special")


class Encoder(Protocol):
    """What a model makes of images and text."""

    @property
    def identity(self) -> Mapping[str, Json]:
        """Class, settings and digest of the processor."""
        ...

    needs_image: bool
    """Whether each example has exactly one image, or one view of it, and no text."""

    def text_of(self, row: Row, number: int) -> tuple[str, Sequence[str]]:
        """Return the text of a row as the processor takes it, and the columns that it was made of."""
        ...

    def encode(self, images: Sequence[Image.Image], text: str, where: str) -> list[ExampleInputs]:
        """Return what the model is given: an example, or one for each view of an image.

        Raises DatasetError that begins with `where`.
        """
        ...


class ImageDataset:
    """The images of one capture: read once as examples, and again when their batches run.

    Args:
        archive: The archive; the spool lies next to it.
        encoder: What the model makes of a row.
        settings: What to read, and which positions to keep.
        rows: The rows of the dataset to read, by number; None for all.
    """

    def __init__(
        self, archive: Path, encoder: Encoder, settings: DatasetSettings, rows: Collection[int] | None = None
    ) -> None:
        self._archive = archive
        self._encoder = encoder
        self._settings = settings
        self._rows = rows
        self._stack = ExitStack()
        self.folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def identity(self) -> Mapping[str, Json]:
        """What the provenance says of the processor."""
        return self._encoder.identity

    def examples(self, source: object, *, model_limit: int | None, report: DatasetReport) -> Iterator[Example]:
        """Read the dataset, as `read_image_examples` does, and keep its images in the spool until the end."""
        self.folder = self._stack.enter_context(spool_folder(self._archive))
        with SpoolWriter(self.folder) as spool:
            yield from read_image_examples(
                source,
                settings=self._settings,
                encoder=self._encoder,
                spool=spool,
                model_limit=model_limit,
                report=report,
                only=self._rows,
            )

    def inputs(self, folder: Path) -> "ImageInputs":
        """Return what makes the inputs of a batch from the spool in `folder`, which another worker may have written."""
        return ImageInputs(spool=Spool(folder), encoder=self._encoder, max_pixels=self._settings.max_image_pixels)


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Makes the inputs of an example from the spool, when its batch runs.

    Attributes:
        spool: The images.
        encoder: What the model makes of them.
        max_pixels: Most pixels of an image.
    """

    spool: Spool
    encoder: Encoder
    max_pixels: int
    _last: dict[tuple[tuple[str, ...], str], list[ExampleInputs]] = field(default_factory=dict, init=False, repr=False)

    def of(self, example: int) -> ExampleInputs:
        """Return the inputs of one example."""
        images, text, view = self.spool.read(example)
        given = (tuple(it.sha256 for it in images), text)
        found = self._last.get(given)  # the views of an image follow each other
        if found is None:
            where = f"example {example}"
            opened = [open_image(it, max_pixels=self.max_pixels, where=where) for it in images]
            found = self.encoder.encode(opened, text, where)
            self._last.clear()
            self._last[given] = found
        return found[view]


def read_image_examples(
    source: object,
    *,
    settings: DatasetSettings,
    encoder: Encoder,
    spool: SpoolWriter,
    model_limit: int | None,
    report: DatasetReport,
    only: Collection[int] | None = None,
) -> Iterator[Example]:
    """Read a dataset with images as examples, in its order: one a row, or one for each view of its image.

    Args:
        source: As for `residua.pipelines.data.dataset.read_examples`; also an iterable of PIL images or paths.
        settings: What to read, and which positions to keep.
        encoder: What the model makes of a row.
        spool: Gets the images of each example.
        model_limit: Most tokens that the model takes; None if it has no limit.
        report: Filled while the examples are read.
        only: The rows to read, by number, each image of which is an example, with the column ``source_image``: its
            number in the row. None for all rows, each an example.

    Raises:
        DatasetError: The dataset cannot be opened, or (while iterating) a row cannot be used, or the dataset gives no
            example at all.
    """
    if settings.long_examples in ("split", "truncate"):
        raise DatasetError(
            f"{named('long_examples', settings.long_examples)}: an example with images is one whole, and cannot be "
            "cut: leave it out, or choose what fits"
        )
    limit = settings.length_limit(model_limit)
    rows = open_rows(source, settings)
    reading = _Reading(
        settings=settings,
        column=_image_column(rows, settings, encoder),
        folder=_folder(source, settings),
        encoder=encoder,
        limit=limit,
        report=report,
        only=only,
    )
    return reading.examples(rows, spool)


def _image_column(rows: Rows, settings: DatasetSettings, encoder: Encoder) -> str:
    refuse_taken(rows.columns, (*SOURCE_COLUMNS, _SOURCE_IMAGE, IMAGES, OTHER_INPUTS))
    asked, found = settings.image_column, ", ".join(rows.columns)
    require_column(named("image_column", asked), asked, rows.columns)
    usual = [name for name in _USUAL if name in rows.columns]
    if asked is None and not usual:
        raise DatasetError(
            f"the model takes images, and the dataset has no column of the name {' or '.join(_USUAL)}, it has {found}: "
            f"name the column with {named('image_column')}"
        )
    rule = settings.rule
    if rule.is_assistant:
        raise DatasetError(
            f"{named('positions', 'assistant')} is for chats without images: give the mask as a column, column:NAME"
        )
    require_column(named("positions", f"column:{rule.column}"), rule.column, rows.columns)
    if encoder.needs_image and settings.text_column is not None:
        raise DatasetError(f"{named('text_column', settings.text_column)}: the model takes images alone: leave it out")
    return usual[0] if asked is None else asked


def _folder(source: object, settings: DatasetSettings) -> Path | None:
    """Return the folder that the images' paths are relative to, and which they may not leave."""
    if settings.image_folder is not None:
        folder = Path(settings.image_folder).expanduser()
        if not folder.is_dir():
            raise DatasetError(f"{named('image_folder', settings.image_folder)}: there is no such folder")
        return folder
    path = local_path(source) if isinstance(source, str | PathLike) else None
    return path if path is None or path.is_dir() else path.parent


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One pass over a dataset with images."""

    settings: DatasetSettings
    column: str
    folder: Path | None
    encoder: Encoder
    limit: int | None
    report: DatasetReport
    only: Collection[int] | None

    def examples(self, rows: Rows, spool: SpoolWriter) -> Iterator[Example]:
        """Yield the examples; raises DatasetError at the end if there are none."""
        report, most = self.report, self.settings.max_tokens
        for number, row in enumerate(rows.rows):
            if most is not None and report.n_tokens >= most:
                report.cut_at_max_tokens = True
                break
            if self.only is not None and number not in self.only:
                continue
            report.n_sources += 1
            images = self._images(row, number)
            text, used = self.encoder.text_of(row, number)
            if not images and (self.encoder.needs_image or not text):
                report.n_empty += 1
                continue
            whole = [(images, {})] if self.only is None else [([it], {_SOURCE_IMAGE: n}) for n, it in enumerate(images)]
            for chosen, columns in whole:
                examples = self._examples(row, number, chosen, text, used, columns)
                spool.add(chosen, text, list(examples))
                for example in examples.values():
                    report.count(example)
                    yield example
        if not report.n_examples:
            raise DatasetError(f"the dataset gives no example: {'; '.join(report.notes())}")

    def _images(self, row: Row, number: int) -> list[GivenImage]:
        where = self._where(number)
        if self.column not in row:
            raise DatasetError(f"{where}: there is no such column; the row has {', '.join(row)}")
        value = row[self.column]
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if self.encoder.needs_image and len(values) > 1 and self.only is None:
            raise DatasetError(f"{where}: there are {len(values)} images, and the model takes one: make a row of each")
        return [given_image(each, folder=self.folder, where=where) for each in values]

    def _where(self, number: int) -> str:
        return f"row {number}, column {self.column!r}"

    def _examples(
        self,
        row: Row,
        number: int,
        images: Sequence[GivenImage],
        text: str,
        used: Sequence[str],
        columns: Mapping[str, object],
    ) -> dict[int, Example]:
        """Return the example of a row, or of one image of it, or of each view of that image; without those left out."""
        where = self._where(number)
        pixels = [open_image(each, max_pixels=self.settings.max_image_pixels, where=where) for each in images]
        others: Mapping[str, object] = {
            name: value for name, value in row.items() if name not in (self.column, self.settings.rule.column, *used)
        }
        where_from = dict(zip(SOURCE_COLUMNS, (number, 0), strict=True))
        found = {}
        for view, inputs in enumerate(self.encoder.encode(pixels, text, where)):
            positions = self._positions(row, number, inputs)
            if positions is not None:
                found[view] = Example(
                    input_ids=inputs.input_ids.astype(np.int32),
                    positions=positions,
                    columns={**others, **where_from, **columns, **_recorded(inputs)},
                    images=tuple(each.sha256 for each in images),
                )
        return found

    def _positions(self, row: Row, number: int, found: ExampleInputs) -> IntArray | None:
        """Return the positions of an example that are kept; None if it is left out."""
        where, rule = self._where(number), self.settings.rule
        n_tokens = found.input_ids.size
        if self.limit is not None and n_tokens > self.limit:
            raise DatasetError(
                f"{where}: text and images have {n_tokens} tokens, and the limit is {self.limit}: choose smaller "
                "images, or leave the row out"
            )
        if n_tokens < self.settings.min_length:
            self.report.n_short += 1
            return None
        modality, row_of = found.columns["modality"], found.columns["patch_row"]
        self.report.n_unplaced += bool(((modality == _IMAGE) & (row_of < 0)).any())
        marked = None
        if rule.column:
            marked = marks_of(row.get(rule.column), n_tokens, column=rule.column, row=number)
        dropped = modality == _SPECIAL if self.settings.drop_special else None
        positions = kept_positions(rule, n_tokens, marked=marked, dropped=dropped)
        if not positions.size:
            self.report.n_without_rows += 1
            return None
        return positions


def _recorded(found: ExampleInputs) -> dict[str, object]:
    """Return the names of the inputs of an example beside tokens, and the values of those with one number a token."""
    kept = {f"{INPUT_PREFIX}{name}": found.tensors[name][0].tolist() for name in OF_TOKENS if name in found.tensors}
    return {OTHER_INPUTS: sorted(found.tensors), **kept}
