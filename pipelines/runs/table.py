"""One line for each token of a run: its text, and what the model predicts there."""

from typing import Any

import pyarrow as pa

from residua.capture.replay.replay import Replay
from residua.pipelines.runs.texts import Texts

_SCHEMA = pa.schema([("example", pa.int64()), ("position", pa.int32()), ("token", pa.int32()), ("text", pa.string())])
_PREDICTED = pa.schema(
    [("loss", pa.float32()), ("top", pa.int32()), ("top_text", pa.string()), ("top_probability", pa.float32())]
)


def token_table(run: Replay, texts: Texts, *, predicts: bool) -> pa.Table:
    """Return the table that `residua.pipelines.runs.result.Run.table` describes.

    Args:
        run: The run.
        texts: The tokenizer.
        predicts: Whether the model's logits predict the next token.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for example, tokens in zip(run.examples, run.tokens, strict=True):
        columns["example"] += [example] * len(tokens)
        columns["position"] += range(len(tokens))
        columns["token"] += tokens
        columns["text"] += _texts(texts, tokens)
    table = pa.table(columns, _SCHEMA)
    if not predicts:
        return table
    found: dict[str, list[Any]] = {name: [] for name in _PREDICTED.names}
    for logits_TV, losses in zip(run.logits, run.losses, strict=True):
        probability, top = logits_TV.detach().float().softmax(-1).max(-1)
        found["loss"] += [*losses.detach().float().tolist(), None]
        found["top"] += top.tolist()
        found["top_text"] += _texts(texts, top.tolist())
        found["top_probability"] += probability.tolist()
    for field in _PREDICTED:
        table = table.append_column(field, pa.array(found[field.name], field.type))
    return table


def _texts(texts: Texts, tokens: list[int]) -> list[str | None]:
    return texts.of_each(tokens) if texts.is_known else [None] * len(tokens)
