"""What a user gives `residua.run` becomes examples in memory: texts, token ids, chats, or what a tokenizer returns."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from residua.pipelines.data.dataset import SOURCE_COLUMNS, DatasetReport, read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import is_dataset, is_frame, open_rows
from residua.pipelines.data.tokenizer import special_ids
from residua.pipelines.runs.texts import Texts
from residua.pipelines.setup.models import token_limit
from residua.store.base.errors import PlanError, shortened
from residua.store.examples.index import Example
from residua.store.examples.memory import ExamplesInMemory


def read_prompts(
    given: object, model: PreTrainedModel, texts: Texts, settings: DatasetSettings
) -> tuple[ExamplesInMemory, list[str]]:
    """Return the prompts as examples, each position of which is kept, and notes on them.

    Args:
        given: A text, token ids or a chat, or several of them; or rows with such a column and others.
        model: The model, which says how many tokens an example may have.
        texts: The tokenizer.
        settings: How texts and chats become tokens.

    Raises:
        PlanError: There is no prompt, one is empty or longer than the model takes, or texts are given and there is no
            tokenizer.
        DatasetError: A prompt is none of these, or a chat cannot be rendered.
    """
    prompts = _as_list(given, settings)
    _refuse_mixed(prompts)
    if _needs_tokenizer(prompts[0]) and not texts.is_known:
        texts.require(f"the prompts are given as {_kind(prompts[0])}s")
    report = DatasetReport()
    examples = list(
        read_examples(
            prompts,
            settings=settings,
            tokenizer=texts.of_model,
            model_limit=None,
            vocab_size=model.config.get_text_config().vocab_size,
            special_ids=special_ids(texts.of_model),
            report=report,
        )
    )
    if len(examples) < len(prompts):
        numbers = {example.columns["source_index"] for example in examples}
        lost = next(number for number in range(len(prompts)) if number not in numbers)
        raise PlanError(f"prompt {lost} has no tokens: {shortened(repr(prompts[lost]))}: leave it out")
    limit = token_limit(model)
    for number, example in enumerate(examples):
        if limit is not None and example.input_ids.size > limit:
            raise PlanError(
                f"prompt {number} has {example.input_ids.size:,} tokens, and {type(model).__name__} takes {limit:,}: "
                "shorten it"
            )
    return ExamplesInMemory(_without_source(example) for example in examples), report.notes()


def _without_source(example: Example) -> Example:
    columns = {name: value for name, value in example.columns.items() if name not in SOURCE_COLUMNS}
    return Example(input_ids=example.input_ids, positions=example.positions, columns=columns)


def _refuse_mixed(prompts: Sequence[object]) -> None:
    """Raise PlanError for a prompt that is empty, or no prompt, or of another kind than the first."""
    first = _kind(prompts[0])
    for number, prompt in enumerate(prompts):
        kind = _kind(prompt)
        if kind is None:
            raise PlanError(
                f"prompt {number} is {shortened(repr(prompt))}: give a text, a list of token ids, a chat or a row with "
                "one of these"
            )
        if kind != _ROW and not len(cast("Sequence[object]", prompt)):
            raise PlanError(f"prompt {number} is empty: {prompt!r}: give at least one token, or leave it out")
        if kind != first and _ROW not in (kind, first):
            raise PlanError(
                f"prompt {number} is a {kind}, and prompt 0 a {first}: give prompts of one kind (the model's tokenizer "
                "makes token ids of texts and chats)"
            )


_TEXT, _IDS, _CHAT, _ROW = "text", "list of token ids", "chat", "row"


def _kind(prompt: object) -> str | None:
    """Return what a prompt is; None if it is none. A row says by its columns what is in it."""
    if isinstance(prompt, Mapping):
        return _ROW
    if isinstance(prompt, str):
        return _TEXT
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return None
    return _CHAT if prompt and isinstance(prompt[0], Mapping) else _IDS


def _needs_tokenizer(prompt: object) -> bool:
    kind = _kind(prompt)
    return kind in (_TEXT, _CHAT) or (kind == _ROW and "input_ids" not in cast("Mapping[str, object]", prompt))


def _as_list(given: object, settings: DatasetSettings) -> list[Any]:
    """Return several prompts; one alone becomes a list of one.

    Raises:
        PlanError: There is none.
        DatasetError: A dataset or table has no rows.
    """
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if isinstance(given, str):
        return [given]
    if is_frame(given) or is_dataset(given):
        return list(open_rows(given, settings).rows)
    if isinstance(given, Mapping):
        return _rows_of_columns(cast("Mapping[str, Any]", given))
    try:
        prompts = [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in cast("Any", given)]
    except TypeError as error:
        raise PlanError(
            f"{given!r:.60} was given ({type(given).__name__}): give a text, token ids or a chat, or a list of them"
        ) from error
    if not prompts:
        raise PlanError("no prompt was given: give at least one text, list of token ids or chat")
    is_one = isinstance(prompts[0], int | np.integer) or (isinstance(prompts[0], Mapping) and "role" in prompts[0])
    return [prompts] if is_one else prompts


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a tokenizer returned, one row of a dataset, or columns of several rows, as rows."""
    values = {
        name: value.tolist() if isinstance(value, Tensor | np.ndarray) else value for name, value in columns.items()
    }
    first = next((values[name] for name in ("input_ids", "text") if name in values), None)
    if not isinstance(first, list) or not first or isinstance(first[0], int):
        return [values]
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == len(first)}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
