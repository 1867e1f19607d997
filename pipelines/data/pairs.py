"""Read a dataset as pairs for an encoder-decoder: source and target, with the tokens that each stack gets.

The source is the content as in any capture. The target is a column of texts, of token ids (labels), or of the decoder's
own token ids. Labels become the decoder's tokens by the rule of the model itself, which puts a start token before them
and leaves the last one out; tokens of a column ``decoder_input_ids`` are taken as they are. Pairs stay whole: a long
source or target is cut at its end or refused, and a pair without tokens on one side is left out and counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any, NamedTuple, cast

import numpy as np

from residua.pipelines.data.dataset import SOURCE_COLUMNS, DatasetReport
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.rows_to_tokens import Source, Tokens
from residua.pipelines.data.sources import Row, Rows, open_rows, refuse_taken, require_column
from residua.pipelines.data.tokenizer import Tokenizer
from residua.store.base.errors import DatasetError
from residua.store.base.naming import named
from residua.store.examples.index import SOURCE_IDS, SOURCE_SHA256, Example
from residua.store.selection.positions import IntArray, kept_positions

DECODER_IDS = "decoder_input_ids"
_TARGETS = (DECODER_IDS, "labels", "target")
_IGNORED_LABEL = -100  # torch's ignore_index, with which labels are padded


class Pair(NamedTuple):
    """One example of both stacks."""

    encoder: Example
    decoder: Example


@dataclass(frozen=True, kw_only=True)
class PairTokens:
    """What turns sources and targets into tokens.

    Attributes:
        tokenizer: A transformers tokenizer; token ids need none.
        shifted: Returns the decoder's token ids for labels, by the model's own rule.
        source_limit: Most tokens of a source; None if the model has no limit.
        target_limit: The same of a target.
        special_ids: Ids of special tokens, for `drop_special`.
        source_vocab: Token ids of the source must lie below it.
        audio_sources: Makes sources of rows of audio; None for an encoder that takes tokens.
        target_vocab: The same of the target.
    """

    tokenizer: Tokenizer | None
    shifted: Callable[[IntArray], IntArray]
    source_limit: int | None
    target_limit: int | None
    special_ids: frozenset[int]
    source_vocab: int
    target_vocab: int
    audio_sources: Callable[[Rows], Iterable[Source]] | None = None


class _OfTarget:
    """A tokenizer as it is for targets: some have another vocabulary or language for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenize texts as targets."""
        make: Any = self._tokenizer
        found: Mapping[str, Any] = make(text_target=text, **options)
        return found


def read_pairs(
    source: object, *, settings: DatasetSettings, tokens: PairTokens, report: DatasetReport
) -> Iterator[Pair]:
    """Read a dataset as pairs, in its order.

    Args:
        source: As for `read_examples`, with a column for the source and one for the target.
        settings: What to read, and how to cut it.
        tokens: What turns it into tokens.
        report: Filled while pairs are read; tokens and rows of both sides count.

    Returns:
        The pairs. The dataset is opened at once and read lazily.

    Raises:
        DatasetError: The dataset cannot be opened or has no such columns, a setting does not fit pairs, or (while
            iterating) a row cannot be used, or the dataset gives no pair at all.
    """
    _check(settings)
    rows = open_rows(source, settings)
    refuse_taken(rows.columns, (*SOURCE_COLUMNS, SOURCE_IDS, SOURCE_SHA256))
    target = _target_column(rows.columns, settings)
    of_sources, of_targets = tee(rows.rows)
    content = settings.text_column
    if content is None and "source" in rows.columns and not {"input_ids", "text"} & set(rows.columns):
        content = "source"
    others = _without(rows, of_sources, {target, *_TARGETS, "decoder_attention_mask"})
    if tokens.audio_sources is None:
        sources: Iterable[Source] = Tokens(
            rows=others,
            settings=replace(settings, text_column=content),
            tokenizer=tokens.tokenizer,
            vocab_size=tokens.source_vocab,
        )
    else:
        sources = tokens.audio_sources(others)
    targets = Tokens(
        rows=Rows(columns=[target], text_columns=[target], rows=(_target_of(row, target) for row in of_targets)),
        settings=replace(settings, text_column=target),
        tokenizer=None if tokens.tokenizer is None else cast("Tokenizer", _OfTarget(tokens.tokenizer)),
        vocab_size=tokens.target_vocab,
    )
    shifted = (lambda ids: ids) if target == DECODER_IDS else tokens.shifted
    return _pairs(sources, targets, settings, replace(tokens, shifted=shifted), report)


def _check(settings: DatasetSettings) -> None:
    rule = settings.rule
    if rule.column or rule.is_assistant:
        raise DatasetError(
            f"{named('positions', settings.positions)} marks tokens of one sequence, and an encoder-decoder has two: "
            "use all, last or every:N, and choose rows of an archive with a condition later"
        )
    if settings.long_examples == "split":
        raise DatasetError(
            f"{named('long_examples', 'split')} cuts a text into windows, and the windows of a source have no targets: "
            "use truncate or refuse"
        )
    if settings.chat_settings:
        raise DatasetError(
            f"{settings.chat_settings[0]} is for chats, and an encoder-decoder takes pairs: leave it out"
        )


def _target_column(columns: Sequence[str], settings: DatasetSettings) -> str:
    asked, found = settings.target_column, ", ".join(columns)
    require_column(named("target_column", asked), asked, columns)
    column = asked or next((name for name in _TARGETS if name in columns), None)
    if column is None:
        raise DatasetError(
            f"an encoder-decoder needs a target for each source, and the dataset has only {found}: name the column of "
            f"texts or labels with {named('target_column')}, or call it {' or '.join(_TARGETS)}"
        )
    if column == settings.text_column:
        raise DatasetError(
            f"column {column!r} is named as source and as target: name another with {named('target_column')}"
        )
    return column


def _without(rows: Rows, stream: Iterator[Row], left_out: set[str]) -> Rows:
    return Rows(
        columns=[name for name in rows.columns if name not in left_out],
        text_columns=[name for name in rows.text_columns if name not in left_out],
        rows=({name: value for name, value in row.items() if name not in left_out} for row in stream),
    )


def _target_of(row: Row, column: str) -> Row:
    """Return the target of a row alone, without the padding of labels."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return {column: value}
    labels = np.asarray(value)
    is_plain = labels.ndim == 1 and labels.dtype.kind in "iu"
    return {column: labels[labels != _IGNORED_LABEL] if is_plain else value}


def _pairs(
    sources: Iterable[Source], targets: Tokens, settings: DatasetSettings, tokens: PairTokens, report: DatasetReport
) -> Iterator[Pair]:
    special = np.array(sorted(tokens.special_ids), np.int32)
    source_limit = settings.length_limit(tokens.source_limit)
    target_limit = tokens.target_limit if settings.max_target_length is None else settings.max_target_length
    for source, target in zip(sources, targets, strict=True):
        report.n_sources += 1
        report.add(source.counts)
        if not source.input_ids.size or not target.input_ids.size:
            report.n_empty += 1
            continue
        source_ids = _cut(source, source.input_ids, source_limit, settings, report, "source")
        shifted = tokens.shifted(target.input_ids)
        target_ids = _cut(source, shifted, target_limit, settings, report, "target")
        if settings.max_tokens is not None and report.n_tokens >= settings.max_tokens:
            report.cut_at_max_tokens = True
            break
        if min(source_ids.size, target_ids.size) < settings.min_length:
            report.n_short += 1
            continue
        kept = [_kept(ids, settings, special) for ids in (source_ids, target_ids)]
        if not kept[0].size or not kept[1].size:
            report.n_without_rows += 1
            continue
        columns = {**source.columns_of(slice(0, source_ids.size), 0), SOURCE_COLUMNS[0]: source.row}
        pair = Pair(
            Example(input_ids=source_ids, positions=kept[0], columns=columns),
            Example(input_ids=target_ids, positions=kept[1], columns={**columns, SOURCE_IDS: source_ids}),
        )
        report.count(*pair)
        yield pair
    if not report.n_examples:
        raise DatasetError(f"the dataset gives no pair of source and target: {'; '.join(report.notes())}")


def _cut(
    source: Source,
    ids: IntArray,
    limit: int | None,
    settings: DatasetSettings,
    report: DatasetReport,
    side: str,
) -> IntArray:
    if limit is None or ids.size <= limit:
        return ids
    name = "max_length" if side == "source" else "max_target_length"
    asked = getattr(settings, name)
    if settings.long_examples == "refuse" or (settings.long_examples is None and asked is None):
        whose = "the model takes" if asked is None else f"{named(name)} is"
        raise DatasetError(
            f"row {source.row} of the dataset has a {side} of {ids.size} tokens, and {whose} {limit}: give "
            f"{named(name, limit)} with {named('long_examples', 'truncate')} to drop the ends of longer ones"
        )
    report.n_truncated += 1
    report.n_truncated_tokens += ids.size - limit
    return ids[:limit]


def _kept(ids: IntArray, settings: DatasetSettings, special: IntArray) -> IntArray:
    dropped = np.isin(ids, special) if settings.drop_special else None
    return kept_positions(settings.rule, ids.size, dropped=dropped)
