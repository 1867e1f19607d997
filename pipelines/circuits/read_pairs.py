"""Reading the pairs of examples that `patch` and `attribute` compare, from a file of JSON lines or from dictionaries.

An example is a text, a list of token ids, or the number of an example of an archive.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.patching.pair import Pair
from residua.capture.sites.anatomy import n_logits_of
from residua.pipelines.data.text_files import check_text, json_lines
from residua.pipelines.setup.models import token_limit, tokenizer_of
from residua.store.base.errors import DatasetError, PlanError, ResiduaError, shortened
from residua.store.base.naming import named
from residua.store.read.archive import Archive
from residua.store.read.text import single_token
from residua.store.storage.mirror import fetched

PairSource = str | PathLike[str] | Iterable[Pair | Mapping[str, Any]]
"""A file of JSON lines, or its address, or dictionaries with ``clean``, ``corrupted``, ``answer`` and ``wrong``."""

_FIELDS = {"clean", "corrupted", "answer", "wrong"}
_MAX_BYTES = 2**28


def read_pairs(
    source: PairSource,
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    archive: Archive | None,
) -> list[Pair]:
    """Return the pairs of `source`, checked against the model.

    ``clean`` and ``corrupted`` are texts, lists of token ids, or numbers of examples of `archive`; ``answer`` and
    ``wrong`` are token ids, or texts that are one token.

    Raises:
        PlanError: An entry is no pair; the message says which and why.
    """
    items = _lines(source) if isinstance(source, str | PathLike) else list(source)
    if not items:
        raise PlanError("there are no pairs: give at least one")
    reader = _PairReader(model, tokenizer, archive)
    pairs = []
    for number, item in enumerate(items, start=1):
        try:
            pairs.append(reader.checked(item if isinstance(item, Pair) else reader.pair(item)))
        except ResiduaError as error:
            raise PlanError(f"pair {number}: {error}") from error
    return pairs


def _lines(source: str | PathLike[str]) -> list[Any]:
    with fetched(source, most_bytes=_MAX_BYTES) as path:
        return _lines_of(path)


def _lines_of(path: Path) -> list[Any]:
    if not path.is_file():
        raise PlanError(f"there is no file of pairs at {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise PlanError(f"{path} is over 256 MiB, too large for a list of pairs")
    try:
        return [value for _, value in json_lines(path)]
    except DatasetError as error:
        raise PlanError(str(error)) from error


class _PairReader:
    """Reads the fields of pairs for one model, tokenizer and archive."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, archive: Archive | None
    ) -> None:
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._n_logits = n_logits_of(model) or self._vocabulary
        self._limit = token_limit(model)
        self._model = model
        self._tokenizer = tokenizer
        self._archive = archive

    def pair(self, item: object) -> Pair:
        if not isinstance(item, Mapping) or not {"clean", "corrupted", "answer"} <= item.keys() <= _FIELDS:
            raise PlanError("a pair has clean, corrupted and answer, and may have wrong; found something else")
        wrong = item.get("wrong")
        return Pair(
            clean=self._example(item["clean"]),
            corrupted=self._example(item["corrupted"]),
            answer=self._answer(item["answer"]),
            wrong=None if wrong is None else self._answer(wrong),
        )

    def checked(self, pair: Pair) -> Pair:
        ids = [*pair.clean, *pair.corrupted, pair.answer, *([] if pair.wrong is None else [pair.wrong])]
        outside = [token for token in ids if not 0 <= token < self._vocabulary]
        if outside:
            raise PlanError(f"the model has no token {outside[0]}: its vocabulary has {self._vocabulary:,}")
        answers = [pair.answer, *([] if pair.wrong is None else [pair.wrong])]
        if (highest := max(answers)) >= self._n_logits:
            raise PlanError(
                f"the answer {highest} has no logit: the model's LM head has {self._n_logits:,}, fewer than its "
                f"vocabulary of {self._vocabulary:,}; choose another answer"
            )
        if self._limit is not None and len(pair.clean) > self._limit:
            raise PlanError(f"{len(pair.clean):,} tokens were given, and the model takes {self._limit:,}")
        return pair

    def _example(self, value: object) -> tuple[int, ...]:
        if isinstance(value, str):
            return tuple(self._tokens(value, special=True))
        if isinstance(value, list | tuple) and all(_is_integer(token) for token in value):
            return tuple(value)
        if isinstance(value, int) and _is_integer(value):
            return self._archived(value)
        raise PlanError(f"an example is a text, a list of token ids, or the number of one; found {str(value)[:60]!r}")

    def _archived(self, number: int) -> tuple[int, ...]:
        if self._archive is None:
            raise PlanError(f"example {number} was named, and no archive: name the archive with {named('archive')}")
        if not 0 <= number < len(self._archive.example_table):
            raise PlanError(f"there is no example {number}: the archive has {len(self._archive.example_table):,}")
        return tuple(np.asarray(self._archive.example_table.tokens(number)).tolist())

    def _answer(self, value: object) -> int:
        if isinstance(value, int) and _is_integer(value):
            return value
        if not isinstance(value, str):
            raise PlanError(f"an answer is a token id or a text that is one token; found {str(value)[:60]!r}")
        return single_token(value, self._tokens(value, special=False), self._text)

    def _text(self, token: int) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        self._tokenizer = self._tokenizer or tokenizer_of(self._model)
        if self._tokenizer is None:
            raise PlanError(
                f"a text was given, and this {type(self._model).__name__} has no tokenizer: pass tokenizer=, or give "
                "token ids"
            )
        check_text(text, f"the text {shortened(repr(text))}")
        return [int(token) for token in self._tokenizer(text, add_special_tokens=special)["input_ids"]]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
