"""Read a dataset as pairs of audio and target, for encoder-decoders whose encoder takes frames (Whisper).

The source of a row is a column ``input_features``, what the model's own feature extractor gives, or a column ``audio``
with ``array`` and ``sampling_rate``, to which the extractor is applied here. An example of the encoder has the
positions that the encoder makes of its frames, and no tokens.

Features are as large as an encoder's rows. While the dataset is read they are written to one file, and batches read
them back in any order; the archive keeps their SHA-256, and not the features themselves.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from residua.pipelines.data.missing_files import to_give
from residua.pipelines.data.rows_to_tokens import Source
from residua.pipelines.data.sources import Row, Rows
from residua.pipelines.data.token_columns import TokenColumns
from residua.store.base.errors import DatasetError
from residua.store.examples.index import NO_TOKEN, SOURCE_SHA256

FEATURES, AUDIO = "input_features", "audio"
_FILE = "features.f4"

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class FrameShape:
    """What an encoder over frames takes of an example, and what it makes of it.

    Attributes:
        n_features: Features of a frame.
        n_frames: Frames of an example.
        n_positions: Positions that the encoder makes of them.
    """

    n_features: int
    n_frames: int
    n_positions: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the features of an example."""
        return self.n_features, self.n_frames


@dataclass(frozen=True, kw_only=True)
class AudioSources:
    """The sources of rows of audio, in order; their features go to a file while they are read.

    Attributes:
        rows: The rows, without their targets.
        frames: What the encoder takes.
        extractor: The model's feature extractor, or a processor that has one; None if there is none.
        folder: Where the features are written.
    """

    rows: Rows
    frames: FrameShape
    extractor: object | None
    folder: Path

    def __post_init__(self) -> None:
        if FEATURES not in self.rows.columns and AUDIO not in self.rows.columns:
            raise DatasetError(
                f"the encoder takes audio, and the dataset has no column {AUDIO} or {FEATURES}: it has "
                f"{', '.join(self.rows.columns)}; rename the column"
            )
        if FEATURES not in self.rows.columns and self.extractor is None:
            raise DatasetError(
                f"column {AUDIO} needs the model's feature extractor: {to_give('processor', 'AutoProcessor')}, or give "
                f"a column {FEATURES} that it made"
            )

    def __iter__(self) -> Iterator[Source]:
        """Yield the sources; raises DatasetError that names a row which cannot be used."""
        columns = TokenColumns()
        with (self.folder / _FILE).open("wb") as file:
            for number, row in enumerate(self.rows.rows):
                features = self._features(row, number)
                file.write(features.tobytes())
                others = {name: value for name, value in row.items() if name not in (FEATURES, AUDIO)}
                yield Source(
                    row=number,
                    input_ids=np.full(self.frames.n_positions, NO_TOKEN, np.int32),
                    marked=None,
                    columns={**others, SOURCE_SHA256: hashlib.sha256(features.tobytes()).hexdigest()},
                    token_columns=columns,
                    counts={},
                )

    def _features(self, row: Row, number: int) -> Features:
        given = row.get(FEATURES) if FEATURES in self.rows.columns else self._extracted(row.get(AUDIO), number)
        try:
            features = np.ascontiguousarray(np.asarray(given, np.float32))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DatasetError(f"row {number}: its {FEATURES} are no numbers: {error}") from error
        features = features[0] if features.shape[:1] == (1,) else features
        if features.shape != self.frames.shape:
            raise DatasetError(
                f"row {number}: its {FEATURES} have the shape {features.shape}, and the encoder takes "
                f"{self.frames.shape} (features, frames): make them with the model's own feature extractor"
            )
        return features

    def _extracted(self, audio: object, number: int) -> object:
        if not isinstance(audio, Mapping) or "array" not in audio or "sampling_rate" not in audio:
            raise DatasetError(
                f"row {number}: column {AUDIO} should hold 'array' and 'sampling_rate', and holds a "
                f"{type(audio).__name__}: decode it first"
            )
        make = cast("Callable[..., Mapping[str, Any]]", getattr(self.extractor, "feature_extractor", self.extractor))
        try:
            found = make(np.asarray(audio["array"]), sampling_rate=audio["sampling_rate"], return_tensors="np")
        except (TypeError, ValueError) as error:  # a sampling rate that is not the model's, above all
            raise DatasetError(f"row {number}: the feature extractor refused its {AUDIO}: {error}") from error
        return found[FEATURES]


def read_features(folder: Path, frames: FrameShape) -> Features:
    """Return the features of all rows of the dataset, (rows, features, frames), mapped from the file."""
    mapped: Features = np.memmap(folder / _FILE, np.float32, "r").reshape(-1, *frames.shape)
    return mapped
