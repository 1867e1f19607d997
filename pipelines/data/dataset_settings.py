"""How a dataset is turned into examples, and what became of it."""

from dataclasses import dataclass

from residua.pipelines.data.positions import PositionRule, parse_positions
from residua.store.base.errors import DatasetError

_LONG = ("refuse", "split", "truncate")


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """How to turn a dataset into examples.

    Raises:
        DatasetError: A value is out of range or contradicts another.
    """

    # Column with the text, messages or token ids; None takes input_ids, text, messages or the only text column.
    text_column: str | None = None
    # Name of the split; None takes train, or the only one.
    split: str | None = None
    # Name of the subset ("configuration") of a dataset on the hub; None takes its default.
    subset: str | None = None
    # Revision of a dataset on the hub; None takes the newest.
    revision: str | None = None
    # Tokens of the whole dataset, after which reading stops; None reads everything.
    max_tokens: int | None = None
    # Tokens an example may have; None takes what the model takes.
    max_length: int | None = None
    # What happens to longer ones: refuse, split, truncate; None splits where max_length is given, else refuses,
    # since nobody should be surprised by a document in pieces.
    long_examples: str | None = None
    # Tokens an example must have; shorter ones are left out and counted.
    min_length: int = 1
    # Which positions become rows: all, last, every:N, column:NAME or assistant.
    positions: str = "all"
    # Whether to keep no rows of special tokens; off, since row and token should match unless asked otherwise.
    drop_special: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_length", "min_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DatasetError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if self.long_examples is not None and self.long_examples not in _LONG:
            raise DatasetError(f"--long-examples {self.long_examples!r}: choose one of {', '.join(_LONG)}")
        if self.max_length is not None and self.min_length > self.max_length:
            raise DatasetError(f"--min-length {self.min_length} is above --max-length {self.max_length}: lower it")
        parse_positions(self.positions)

    @property
    def rule(self) -> PositionRule:
        """The parsed `positions`."""
        return parse_positions(self.positions)

    @property
    def long_rule(self) -> str:
        """What happens to examples that are too long, with the default filled in."""
        return self.long_examples or ("refuse" if self.max_length is None else "split")

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


@dataclass(kw_only=True)
class DatasetReport:
    """What became of a dataset; filled while it is read, so that nothing goes missing unseen."""

    # Texts, chats or token lists read.
    n_sources: int = 0
    # Examples that came of them, their tokens (added start tokens included) and their rows.
    n_examples: int = 0
    n_tokens: int = 0
    n_rows: int = 0
    # Sources that were split into windows, and that lost their end to `truncate`.
    n_split: int = 0
    n_truncated: int = 0
    # Tokens lost to `truncate`, and padding taken off by the dataset's attention_mask.
    n_truncated_tokens: int = 0
    n_padding: int = 0
    # Sources without a token; examples shorter than min_length; examples of which no position is kept. All left out.
    n_empty: int = 0
    n_short: int = 0
    n_without_rows: int = 0
    # Whether max_tokens ended the reading, and the tokens that the last example lost to it.
    cut_at_max_tokens: bool = False
    n_cut_tokens: int = 0

    def notes(self) -> list[str]:
        """Return one sentence for everything that was cut or left out."""
        told = {
            f"{self.n_empty} rows of the dataset have no tokens and were left out": self.n_empty,
            f"{self.n_split} rows of the dataset were split into windows": self.n_split,
            f"{self.n_truncated} rows lost {self.n_truncated_tokens} tokens at their end": self.n_truncated,
            f"{self.n_padding} tokens of padding were taken off": self.n_padding,
            f"{self.n_short} examples were shorter than asked and left out": self.n_short,
            f"{self.n_without_rows} examples have no position to keep and were left out": self.n_without_rows,
            f"--max-tokens ended the reading; the last example lost {self.n_cut_tokens} tokens": self.cut_at_max_tokens,
        }
        return [sentence for sentence, count in told.items() if count]
