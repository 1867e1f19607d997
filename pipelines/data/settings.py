"""How a dataset becomes examples: the settings, which are also flags of ``residua capture``."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError
from residua.store.selection.positions import PositionRule, parse_positions

_LONG = ("refuse", "split", "truncate")


def setting(default: Any, text: str) -> Any:
    """Return a dataclass field with `text` as its help on the command line, which adds a default other than None."""
    return field(default=default, metadata={"help": text})


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``--max-length`` for ``max_length``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """How to turn a dataset into examples. Each field is a flag of ``residua capture``.

    Raises:
        DatasetError: A value is out of range or contradicts another.
    """

    text_column: str | None = setting(
        None, "column with the texts, chats or token ids (default: input_ids, text, messages or the only text column)"
    )
    split: str | None = setting(None, "split of the dataset (default: train, or the only split)")
    subset: str | None = setting(None, "subset (configuration) of a dataset on the hub (default: the dataset's own)")
    dataset_revision: str | None = setting(None, "revision of a dataset on the hub (default: the newest)")
    max_tokens: int | None = setting(None, "stop reading after this many tokens (default: read the full dataset)")
    max_length: int | None = setting(None, "longest example, in tokens (default: what the model takes)")
    # Longer examples are refused by default: a document in pieces should surprise nobody.
    long_examples: str | None = setting(
        None,
        "what to do with longer examples: refuse, split, truncate (default: split if --max-length is given, "
        "else refuse)",
    )
    min_length: int = setting(1, "shortest example, in tokens; shorter ones are left out and counted")
    positions: str = setting("all", "positions that become rows: all, last, every:N, column:NAME, assistant")
    drop_special: bool = setting(False, "leave out the rows of special tokens, such as BOS")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_length", "min_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DatasetError(f"{flag_of(name)} is {value}: it must be at least 1")
        if self.long_examples is not None and self.long_examples not in _LONG:
            raise DatasetError(f"--long-examples {self.long_examples!r}: choose one of {', '.join(_LONG)}")
        if self.max_length is not None and self.min_length > self.max_length:
            raise DatasetError(f"--min-length {self.min_length} is above --max-length {self.max_length}: lower it")
        parse_positions(self.positions)

    @cached_property
    def rule(self) -> PositionRule:
        """The parsed `positions`."""
        return parse_positions(self.positions)

    @property
    def long_rule(self) -> str:
        """The value of `long_examples`, with the default filled in."""
        return self.long_examples or ("refuse" if self.max_length is None else "split")

    def rules(self) -> dict[str, Json]:
        """Return the settings that shape the examples, as a plan records them."""
        values = {f.name.removeprefix("dataset_"): getattr(self, f.name) for f in fields(DatasetSettings)}
        return {**values, "long_examples": self.long_rule}

    def length_limit(self, model_limit: int | None) -> int | None:
        """Return the most tokens of an example; None if nothing limits it.

        Raises:
            DatasetError: `max_length` is above what the model takes.
        """
        if self.max_length is None:
            return model_limit
        if model_limit is not None and self.max_length > model_limit:
            raise DatasetError(
                f"--max-length is {self.max_length}, the model takes {model_limit} tokens: give at most {model_limit}"
            )
        return self.max_length
