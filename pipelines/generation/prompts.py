"""The prompts of a capture that generates: read from the dataset, given seeds, and divided into units of work.

The seed of an example follows from the user's seed, the tokens of its prompt, and how many equal prompts came before
it. So the order of a dataset and its other rows change no continuation, and a prompt that is there twice gets two.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.data.sources import refuse_taken
from residua.pipelines.data.tokenizer import Tokenizer
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.examples.index import Example, ExampleIndex, IntArray
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter

SEED, BEGINS, GENERATED, ENDED = "generation_seed", "generated_from", "generated", "finish_reason"
COLUMNS = (SEED, BEGINS, GENERATED, ENDED)
"""Columns of the examples: the seed, the position of the first new token, which tokens are new, and how it ended."""

_SORTED_PROMPTS = 1024  # neighbours that are sorted by length, so that little is padded
_MOST_PROMPTS = 256  # of a unit, whose next tokens' scores are in memory together


@dataclass(kw_only=True)
class PromptReader:
    """Reads a dataset as prompts.

    Attributes:
        dataset: As for `residua.capture_dataset`.
        settings: The settings of the capture.
        tokenizer: Needed for texts and chats.
        model_limit: Most tokens that the model takes; None if it has no limit.
        vocab_size: Token ids lie below it.
        is_sampled: Whether prompts get seeds.
        end_ids: Tokens that end a text.
        on_example: Called with the prompts and tokens read so far, after each prompt.
        n_ended: Prompts that end with one of `end_ids`; counted while they are read.
    """

    dataset: object
    settings: CaptureSettings
    tokenizer: Tokenizer | None
    model_limit: int | None
    vocab_size: int
    is_sampled: bool
    end_ids: Sequence[int]
    on_example: Callable[[int, int], None]
    n_ended: int = 0

    def write(self, folder: Path, report: DatasetReport) -> ExampleIndex:
        """Write the prompts to a folder, as an example table; `report` is filled.

        Raises:
            DatasetError: The dataset cannot be used as asked.
        """
        writer = ExampleWriter(folder)
        seen: Counter[bytes] = Counter()
        for example in self._examples(report):
            refuse_taken(example.columns, COLUMNS)
            columns = dict(example.columns)
            if self.is_sampled:
                columns[SEED] = seed_of(self.settings.seed, example.input_ids, seen)
            self.n_ended += int(example.input_ids[-1]) in self.end_ids
            writer.add(replace(example, columns=columns))
            self.on_example(report.n_examples, report.n_tokens)
        return writer.close()

    def _examples(self, report: DatasetReport) -> Iterator[Example]:
        return read_examples(
            self.dataset,
            settings=replace(self.settings, positions="all", drop_special=False),
            tokenizer=self.tokenizer,
            model_limit=self.model_limit,
            vocab_size=self.vocab_size,
            report=report,
        )


def seed_of(seed: int, prompt: IntArray, seen: Counter[bytes]) -> int:
    """Return the seed of an example, from 0 to 2^63 - 1, and count its prompt in `seen`."""
    content = hashlib.sha256(prompt.astype("<i4").tobytes()).digest()[:16]
    text = f"{seed} {content.hex()} {seen[content]}"
    seen[content] += 1
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def units_of(n_tokens: IntArray, n_new: int, batch_tokens: int) -> list[list[int]]:
    """Divide prompts into units: batches of prompts of similar length, in an order that lengths alone decide.

    Args:
        n_tokens: Tokens of each prompt.
        n_new: Most new tokens of each.
        batch_tokens: Most token positions of a unit, padding and new tokens included; one prompt may have more.
    """
    units: list[list[int]] = []
    for first in range(0, len(n_tokens), _SORTED_PROMPTS):
        lengths = n_tokens[first : first + _SORTED_PROMPTS]
        unit: list[int] = []
        for place in np.argsort(lengths, kind="stable").tolist():
            n_positions = (len(unit) + 1) * (int(lengths[place]) + n_new)
            if unit and (n_positions > batch_tokens or len(unit) >= _MOST_PROMPTS):
                units.append(unit)
                unit = []
            unit.append(first + place)
        units.append(unit)
    return units


def seeds_of(table: ExampleTable) -> list[int]:
    """Return the seed of each prompt; 0 where prompts have none."""
    if SEED not in table.column_types():
        return [0] * len(table)
    return [int(seed) for seed in table.table([SEED])[SEED].to_pylist()]


def in_order(
    units: Sequence[Sequence[int]], read: Callable[[int, Sequence[int]], Sequence[IntArray]]
) -> Iterator[IntArray]:
    """Yield the new tokens of all prompts, in the order of the prompts.

    Args:
        units: The units.
        read: Returns the new tokens of a unit's prompts.
    """
    waiting: dict[int, IntArray] = {}
    following = 0
    for number, prompts in enumerate(units):
        waiting.update(zip(prompts, read(number, prompts), strict=True))
        while following in waiting:
            yield waiting.pop(following)
            following += 1
