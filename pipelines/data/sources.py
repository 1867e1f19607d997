"""Open what a user calls a dataset as a stream of rows: a path, a hub id, a `datasets` object or an iterable.

Files of text are read here (`residua.pipelines.data.text_files`); all else by `datasets`, whose rows are taken as it
yields them, as streams or memory maps, without its cache. A dataset on the hub is read from one commit throughout. No
code of a dataset is run, and nothing is unpickled. A few hundred rows are in memory at a time.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from pyarrow.types import is_integer

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.text_files import TextFiles, check_text
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named

Row = Mapping[str, Any]

_ROWS_AT_ONCE = 128
_HUB_SECONDS = 10.0  # for the one request that shows whether the hub answers
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".arrow": "arrow",
}
_LONG_COLUMNS = ("input_ids", "attention_mask")
_OF_EVERY_BUILDER = ("name", "version", "data_dir", "data_files", "description")
_FRAMES = (("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "Table"))
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True)
class Rows:
    """A stream of rows.

    Attributes:
        columns: Names of all columns.
        text_columns: Names of those that hold text.
        rows: The rows.
        runs_code: Whether code of the user's may run while they are read.
    """

    columns: Sequence[str]
    text_columns: Sequence[str]
    rows: Iterator[Row]
    runs_code: bool = True


def require_column(asked: str, column: str | None, columns: Sequence[str]) -> None:
    """Raise DatasetError if the dataset lacks a column that a setting, `asked` as the user gave it, names."""
    if column and column not in columns:
        raise DatasetError(f"{asked}: the dataset has no such column, it has {', '.join(columns)}")


def refuse_taken(columns: Iterable[str], own: Collection[str]) -> None:
    """Raise DatasetError if one of a dataset's columns has the name of one of `own`, which its examples get."""
    if taken := [name for name in columns if name in own]:
        raise DatasetError(f"the dataset has a column {taken[0]!r}, which the examples need for themselves: rename it")


def open_rows(source: object, settings: DatasetSettings) -> Rows:
    """Open `source` as a stream of rows.

    Args:
        source: A path or hub id; a `datasets` object; a DataFrame of pandas or polars, or an Arrow table; or an
            iterable of texts, of lists of token ids, of chats (lists of messages), or of rows (dictionaries). Texts
            become a column ``text``, token ids ``input_ids``, chats ``messages``; rows stay as they are.
        settings: Split, subset and revision.

    Raises:
        DatasetError: The source does not exist, cannot be read, has no rows or no such split.
    """
    name = repr(fspath(source)) if isinstance(source, str | PathLike) else f"a {type(source).__name__}"
    if isinstance(source, str | PathLike):
        dataset = _open_path(name, source, settings)
    elif is_dataset(source):
        dataset = source
    elif is_frame(source) or (isinstance(source, Iterable) and not isinstance(source, bytes | Mapping)):
        if settings.split is not None:
            raise DatasetError(f"{named('split', settings.split)}: {name} has no splits; leave it out")
        items = _frame_rows(name, source) if is_frame(source) else cast("Iterable[object]", source)
        return _peek_rows(name, _checked_rows(items))
    else:
        raise DatasetError(
            f"{name} is not a dataset: give a path, a hub id, a DataFrame, or an iterable of texts, token ids, chats "
            "or rows"
        )
    chosen = _one_split(name, dataset, settings.split)
    found = _peek_rows(name, _checked_rows(chosen) if isinstance(chosen, TextFiles) else _dataset_rows(chosen))
    return replace(found, runs_code=is_dataset(source) and not is_at_rest(source))


def local_path(source: str | PathLike[str]) -> Path | None:
    """Return the file or folder that `source` names; None if there is none and `source` may be a hub id.

    Raises:
        DatasetError: There is none, and `source` cannot be a hub id.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not isinstance(source, str) or _data_suffix(path) or not _HUB_ID.fullmatch(source):
        raise DatasetError(f"dataset {fspath(source)!r}: there is no such file or folder; check the path")
    return None


def _data_suffix(path: Path) -> str:
    """Return the suffix that shows a data file's format, or an empty text."""
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    return suffix if suffix in _KINDS else ""


def dataset_commit(name: str, settings: DatasetSettings) -> str | None:
    """Return the commit of the hub dataset `name`; None offline, where only the local cache can be read.

    Raises:
        DatasetError: There is no such dataset, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # One short request: load_dataset would retry for almost a minute where there is no network.
        return HfApi().dataset_info(name, revision=settings.dataset_revision, timeout=_HUB_SECONDS).sha
    except OfflineModeIsEnabled:
        return None
    except Exception as error:
        # The boundary to the hub's client and its transport, whose errors have no common base.
        raise _not_found(name, error) from error


def _open_hub(name: str, settings: DatasetSettings) -> Any:
    """Open the hub dataset `name` as a stream, or from the local cache when offline (HF_HUB_OFFLINE=1)."""
    import datasets

    commit = dataset_commit(name, settings)
    try:
        if commit is None:
            return datasets.load_dataset(name, settings.subset, revision=settings.dataset_revision)
        builder = datasets.load_dataset_builder(name, settings.subset, revision=commit)
        return _text_splits(builder, settings) or builder.as_streaming_dataset()
    except Exception as error:
        # The boundary to `datasets`, which passes on whatever its parsers and transports raise.
        raise _not_found(name, error) from error


def _not_found(name: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"dataset {name!r}: there is no such file or folder here, and it could not be read from the hub "
        f"({type(error).__name__}: {error}); check the path, the id and the network"
    )


def _open_path(name: str, source: str | PathLike[str], settings: DatasetSettings) -> Any:
    path = local_path(source)
    if path is None:
        return _open_hub(fspath(source), settings)
    for flag, value in ((named("subset"), settings.subset), (named("dataset_revision"), settings.dataset_revision)):
        if value is not None:
            raise DatasetError(f"{flag} is given, but {name} is a local path: leave it out")
    with _naming_dataset(name):
        return _open_folder(path, settings) if path.is_dir() else _open_file(path, settings)


def _open_file(path: Path, settings: DatasetSettings) -> Any:
    import datasets

    suffix = _data_suffix(path)
    if not suffix:
        raise DatasetError(
            f"dataset {str(path)!r}: its name does not show its format; known endings are {', '.join(_KINDS)}"
        )
    kind = _KINDS[suffix]
    if kind == "arrow":
        return datasets.Dataset.from_file(str(path))
    if kind == "parquet":
        # Without a batch size, a table is as high as the first row group, and missing if that is empty.
        return datasets.Dataset.from_parquet(str(path), streaming=True, batch_size=_ROWS_AT_ONCE)
    return _text_files([str(path)], kind, "\t" if suffix == ".tsv" else ",", settings)


def _text_files(paths: Sequence[str], kind: str, separator: str, settings: DatasetSettings) -> TextFiles:
    texts = ("text", settings.text_column or "text")
    return TextFiles(paths=paths, kind=kind, separator=separator, texts=texts)


def _open_folder(path: Path, settings: DatasetSettings) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    builder = datasets.load_dataset_builder(str(path))
    return _text_splits(builder, settings) or builder.as_streaming_dataset()


def _text_splits(builder: Any, settings: DatasetSettings) -> dict[str, TextFiles] | None:
    """Return the splits of a dataset of text files; None if it has other files, or sets options or types for them."""
    config = builder.config
    kind = type(config).__module__.rpartition(".")[2]
    if kind not in ("json", "csv", "text") or builder.info.features is not None:
        return None
    plain = type(config)()
    options = {
        field.name
        for field in fields(config)
        if field.name not in _OF_EVERY_BUILDER and getattr(config, field.name) != getattr(plain, field.name)
    }
    files = {str(split): list(map(str, paths)) for split, paths in config.data_files.items()}
    if options - {"sep", "delimiter"} or not all(_data_suffix(Path(path)) for path in chain(*files.values())):
        return None
    separator = getattr(config, "sep", ",")
    return {split: _text_files(paths, kind, separator, settings) for split, paths in files.items()}


def is_dataset(source: object) -> bool:
    """Return whether `source` is an object of the `datasets` library, without importing the library."""
    return type(source).__module__.partition(".")[0] == "datasets"


def is_at_rest(source: object) -> bool:
    """Return whether `source` is a `datasets.Dataset` whose rows are all there: no transform computes them later."""
    form: Mapping[str, Any] = getattr(source, "format", {})
    return is_dataset(source) and type(source).__name__ == "Dataset" and form.get("type") != "custom"


def _one_split(name: str, dataset: Any, split: str | None) -> Any:
    if not isinstance(dataset, dict):
        own = getattr(dataset, "split", None)
        if split is not None and split != str(own or "train"):
            raise DatasetError(f"{named('split', split)}: {name} has only {str(own or 'train')!r}: leave it out")
        return dataset
    names = list(dataset)
    if split is None and "train" not in names and len(names) != 1:
        raise DatasetError(f"{name} has the splits {', '.join(names)}: choose one with {named('split')}")
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names:
        raise DatasetError(
            f"{named('split', chosen)}: {name} has {', '.join(names)}; slices such as train[:10%] are not supported, "
            f"use {named('max_tokens')}"
        )
    return dataset[chosen]


def _dataset_rows(dataset: Any) -> Iterator[Row]:
    """Yield the rows as ``iter(dataset)`` does, after any transform: plain values, and media as they are stored.

    A format such as torch or pandas chooses columns here; the numbers are the dataset's own.
    """
    form = getattr(dataset, "format", None)  # streams have none, and no transform
    if form is not None and form["type"] == "custom":
        return _checked_rows(dataset)
    chosen = {} if form is None else {key: form[key] for key in ("columns", "output_all_columns")}
    if dataset.features and all(type(leaf).__name__ == "Value" for leaf in _leaves(dataset.features)):
        tables = dataset.with_format("arrow", **chosen).iter(batch_size=_ROWS_AT_ONCE)
        return chain.from_iterable(map(_table_rows, tables))
    return _checked_rows(_with_stored_media(dataset.with_format(None, **chosen), chosen.get("columns")))


def _table_rows(table: Any) -> Iterator[Row]:
    """Yield the rows of a table that needs no decoding, about ten times as fast as `datasets` does.

    One row at a time: a table of long examples is many times larger as Python numbers.
    """
    columns = {name: table.column(name) for name in table.schema.names}
    for i in range(len(table)):
        yield {name: _cell(name, column[i]) for name, column in columns.items()}


def _cell(name: str, scalar: Any) -> Any:
    """Return a value as Python has it; token ids as an array."""
    values: Any = getattr(scalar, "values", None) if name in _LONG_COLUMNS else None
    if not hasattr(values, "null_count") or values.null_count or not is_integer(values.type):  # a struct has a method
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)


def _with_stored_media(dataset: Any, columns: Sequence[str] | None) -> Any:
    """Return a dataset that gives images, audio and video as bytes and paths: decoding them needs more libraries."""
    if not any(_is_media(feature) for feature in _leaves(dataset.features or {})):
        return dataset
    if hasattr(dataset, "to_iterable_dataset"):
        dataset = dataset.with_format(None).select_columns(list(columns or dataset.column_names)).to_iterable_dataset()
    features = dataset.features.copy()
    for feature in filter(_is_media, _leaves(features)):
        feature.decode = False
    features.update(dict(features))  # it remembers, from when a column was set, whether to decode it
    # The library's own decode(False) stops the decoding of JSON too: the cast starts that again.
    return dataset.decode(False).cast(features)


def _leaves(feature: Any) -> Iterator[Any]:
    """Yield the features at the ends of a tree of features."""
    if isinstance(feature, Mapping):
        inner = list(feature.values())
    elif isinstance(feature, list):
        inner = feature
    else:
        inner = [feature.feature] if hasattr(feature, "feature") else []
    yield from chain.from_iterable(map(_leaves, inner)) if inner else [feature]


def _is_media(feature: Any) -> bool:
    return hasattr(feature, "decode") and type(feature).__name__ != "Json"


def is_frame(source: object) -> bool:
    """Return whether `source` is a DataFrame of pandas or polars or an Arrow table, without importing these."""
    return (type(source).__module__.partition(".")[0], type(source).__name__) in _FRAMES


def _frame_rows(name: str, frame: Any) -> Iterator[Row]:
    """Return the rows of a frame as plain values; a missing value is None, and the index is left out."""
    columns = list(getattr(frame, "column_names", frame.columns))
    wrong = [column for column in columns if not isinstance(column, str) or columns.count(column) > 1]
    if wrong:
        raise DatasetError(f"{name} has a column {wrong[0]!r}: give each column a name of its own that is a text")
    if hasattr(frame, "column_names"):
        return _table_rows(frame)
    return frame.iter_rows(named=True) if hasattr(frame, "iter_rows") else _pandas_rows(frame, columns)


def _pandas_rows(frame: Any, columns: list[str]) -> Iterator[Row]:
    for start in range(0, len(frame), _ROWS_AT_ONCE):
        part = frame.iloc[start : start + _ROWS_AT_ONCE]
        values = [
            [None if missing else value for value, missing in zip(part[c].tolist(), part[c].isna(), strict=True)]
            for c in columns
        ]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def _checked_rows(items: Iterable[object]) -> Iterator[Row]:
    return (_checked(number, _row_of(number, item)) for number, item in enumerate(items))


def _peek_rows(name: str, found: Iterable[Row]) -> Rows:
    rows = _guarded(name, found)
    ahead = list(islice(rows, _ROWS_AT_ONCE))
    if not ahead:
        raise DatasetError(f"dataset {name} is empty: it has no rows")
    columns = list(ahead[0])
    first_values = {key: next((row[key] for row in ahead if row.get(key) is not None), None) for key in columns}
    return Rows(
        columns=columns,
        text_columns=[key for key, value in first_values.items() if isinstance(value, str)],
        rows=chain(ahead, rows),
    )


def _checked(number: int, row: Row) -> Row:
    """Return a row with its token ids as an array, which is much smaller than a list.

    Raises:
        DatasetError: A text of the row has a lone surrogate.
    """
    found = {}
    for name, value in row.items():
        compact = _compact(value) if name in _LONG_COLUMNS else value
        for text in _texts([name, compact]):
            if not text.isascii():
                check_text(text, f"row {number}: column {name!r}")
        found[name] = compact
    return found


def _compact(value: object) -> object:
    if not isinstance(value, list) or not value or not isinstance(value[0], int):
        return value
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        return value
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else value


def _texts(value: object) -> Iterator[str]:
    """Yield every text inside a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            if isinstance(inner, str | Mapping | list | tuple):
                yield from _texts(inner)


def _guarded(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield `rows`; an error names the dataset, and how far it was read."""
    n_rows = 0
    with _naming_dataset(name, lambda: f" after {n_rows} rows"):
        for row in rows:
            yield row
            n_rows += 1


@contextmanager
def _naming_dataset(name: str, how_far: Callable[[], str] = str) -> Iterator[None]:
    """Turn an error of reading into one that names the dataset."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        # The boundary to `datasets`, as above, and to the user's own iterable.
        raise DatasetError(f"dataset {name} cannot be read{how_far()}: {type(error).__name__}: {error}") from error


def _row_of(number: int, item: object) -> Row:
    if isinstance(item, Mapping):
        return item
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, PurePath) or type(item).__module__.partition(".")[0] == "PIL":
        return {"image": item}
    if isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
        return {"messages": item}
    if isinstance(item, list | tuple) or hasattr(item, "__array__"):
        return {"input_ids": item}
    raise DatasetError(
        f"row {number}: the dataset yields {item!r:.80}, which is not a text, a list of token ids, a chat, an image or "
        "a row (a dictionary)"
    )
