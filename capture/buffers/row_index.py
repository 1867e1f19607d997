"""Row index: from (example, padded position) in a site's tensor to the rows of the archive and of its shards.

`batch_rows` numbers the rows of a padded batch, `RowIndex` copies those that lie in one shard, and `by_position` gives
a site's tensor the axes that both expect.

Legend: `B` examples in the batch, `T` padded positions, `N` kept rows of the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.runtime.devices import uploaded
from residua.store.base.errors import CaptureError
from residua.store.encoding.lossy import count_nonfinite
from residua.store.format.site_names import parse_site

Indices: TypeAlias = "npt.NDArray[np.int64]"
_RUNS_WORTH_LOOPING = 4  # with fewer rows in each run, one indexed copy is faster than a loop over slices
FIRST_ROW_AXIS = 2
"""First axis of the row in a site's tensor; the axes before it are examples and positions."""

Integer = TypeVar("Integer", np.int32, np.int64)


@dataclass(frozen=True, kw_only=True)
class ExampleRows:
    """One example of a batch.

    Attributes:
        example: Its number in the archive.
        first_row: Row of its first kept position.
        input_ids: Its tokens, (tokens,).
        positions: The kept positions, (rows,), strictly increasing.
        padded: The padded position of each token, (tokens,).
        columns: What else is known of each token, by name, each (tokens,).
        source: In a decoder, the padded position of each token of the source, (source tokens,).
    """

    example: int
    first_row: int
    input_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    padded: Indices
    columns: Mapping[str, npt.NDArray[np.signedinteger[Any]]] = field(default_factory=dict)
    source: "Indices | None" = None


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """The kept rows of one batch.

    Attributes:
        source: For each row its index into the tensor's flattened (B, T) axes, (N,).
        row: For each row its number in the archive, (N,).
        token: Token id of each row, (N,).
        position: Position of each row in its example, (N,).
        example: Number of each row's example, (N,).
        tokens_of: For each example of the batch the padded positions of its tokens, in order; they select from the
            key axis of a pattern.
        n_positions: Padded length `T`.
        sequence_of: For each example its entry along the batch axis `B`; None if each has its own, in order.
        n_sequences: Length of the batch axis; None for the number of examples.
        columns: Other columns of the rows, by name, each (N,).
        sources_of: In a decoder, for each example the padded positions of its source's tokens; they select from the
            key axis of a pattern of cross-attention.
    """

    source: Indices
    row: Indices
    token: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    example: Indices
    tokens_of: Sequence[Indices]
    n_positions: int
    sequence_of: Sequence[int] | None = None
    n_sequences: int | None = None
    columns: Mapping[str, npt.NDArray[np.signedinteger[Any]]] = field(default_factory=dict)

    def column(self, name: str) -> npt.NDArray[np.signedinteger[Any]]:
        """Return one column of the rows: token, position, example, or another, (N,)."""
        found = self.columns[name] if name in self.columns else getattr(self, name)
        return cast("npt.NDArray[np.signedinteger[Any]]", found)

    sources_of: Sequence[Indices] | None = None

    def keys_of(self, site: str) -> Sequence[Indices]:
        """Return for each example the padded positions of the keys that a pattern's row has.

        Raises:
            CaptureError: The keys are of a source that is not known.
        """
        if parse_site(site).kind == "pattern":
            return self.tokens_of
        if self.sources_of is None:
            raise CaptureError(
                f"{site} has one entry for each position of the source, which a loop of your own does not show: "
                "capture it with residua.capture_dataset"
            )
        return self.sources_of

    @property
    def shape(self) -> tuple[int, int]:
        """Lengths of the batch axis and of the axis of padded positions."""
        return (len(self.tokens_of) if self.n_sequences is None else self.n_sequences, self.n_positions)

    @cached_property
    def example_at(self) -> Indices:
        """For each entry of the flattened (B, T) axes the place in the batch of the example whose token it is."""
        at = np.full(int(np.prod(self.shape)), -1, np.int64)
        for place, padded in enumerate(self.tokens_of):
            at[self._sequence(place) * self.n_positions + padded] = place
        return at

    def _sequence(self, place: int) -> int:
        return place if self.sequence_of is None else self.sequence_of[place]

    def per_shard(self, rows_per_shard: int) -> Iterator[tuple[int, Indices]]:
        """Yield each shard that has rows of the batch, with the indices of these rows in the batch."""
        if not len(self.row):
            return
        first, last = (int(row) // rows_per_shard for row in (self.row.min(), self.row.max()))
        if first == last:  # true for most batches, and takes a tenth of the time
            yield first, np.arange(len(self.row))
            return
        shards = self.row // rows_per_shard
        for shard in np.unique(shards):
            yield int(shard), np.flatnonzero(shards == shard)


def batch_rows(
    examples: Sequence[ExampleRows],
    n_positions: int,
    *,
    sequence_of: Sequence[int] | None = None,
    n_sequences: int | None = None,
) -> BatchRows:
    """Return the rows of a batch whose tensors have `n_positions` padded positions.

    Args:
        examples: The examples.
        n_positions: Padded length `T`.
        sequence_of: For each example its entry along the batch axis; None if each has its own, in order.
        n_sequences: Length of the batch axis; None for the number of examples.
    """
    counts = [len(example.positions) for example in examples]
    sources = [example.source for example in examples if example.source is not None]
    entries = range(len(examples)) if sequence_of is None else sequence_of
    return BatchRows(
        source=_join(
            [b * n_positions + example.padded[example.positions] for b, example in zip(entries, examples, strict=True)],
            np.int64,
        ),
        row=_join(
            [np.arange(example.first_row, example.first_row + len(example.positions)) for example in examples], np.int64
        ),
        token=_join([example.input_ids[example.positions] for example in examples], np.int32),
        position=_join([example.positions for example in examples], np.int32),
        example=np.repeat(np.array([example.example for example in examples], np.int64), counts),
        tokens_of=[example.padded for example in examples],
        n_positions=n_positions,
        sequence_of=sequence_of,
        n_sequences=n_sequences,
        columns={
            name: np.concatenate([example.columns[name][example.positions] for example in examples])
            for name in (examples[0].columns if examples else ())
        },
        sources_of=sources if len(sources) == len(examples) else None,
    )


def _join(arrays: Sequence[npt.NDArray[Any]], dtype: type[Integer]) -> npt.NDArray[Integer]:
    """Concatenate `arrays`; a batch may have none."""
    return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype)


class RowIndex:
    """The index of a batch's rows that lie in one shard: where each comes from, and where it goes.

    Args:
        source: Indices into the flattened (B, T) axes, (n,).
        target: Rows inside the shard, (n,).
    """

    def __init__(self, source: Indices, target: Indices) -> None:
        order = np.argsort(target, kind="stable")  # adjacent rows of the shard are copied together
        source, target = source[order], target[order]
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self.source = source
        self.target = target
        self._by_block: dict[int, list[tuple[int, RowIndex]]] = {}
        breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
        starts = np.concatenate([[0], breaks])
        lengths = np.diff(np.concatenate([starts, [len(source)]]))
        self._runs = list(zip(source[starts].tolist(), target[starts].tolist(), lengths.tolist(), strict=True))

    def _source_indices(self, device: torch.device) -> torch.Tensor:
        """Return `source` as an int64 tensor on `device`."""
        if device not in self._on_device:
            self._on_device[device] = uploaded(torch.from_numpy(self.source), device)
        return self._on_device[device]

    @cached_property
    def _target_indices(self) -> torch.Tensor:
        return torch.from_numpy(self.target)

    def per_block(self, height: int) -> list[tuple[int, "RowIndex"]]:
        """Return the index for each block of `height` rows of the shard that has rows of the batch."""
        if self.target[-1] < height:
            return [(0, self)]
        if height not in self._by_block:
            blocks = self.target // height
            starts = np.flatnonzero(np.diff(blocks, prepend=-1))
            self._by_block[height] = [
                (int(blocks[picked[0]]), RowIndex(self.source[picked], self.target[picked] % height))
                for picked in np.split(np.arange(len(blocks)), starts[1:])
            ]
        return self._by_block[height]

    def copy(self, flat: torch.Tensor, buffer: torch.Tensor) -> None:
        """Copy the rows from `flat` (B * T, *row) to `buffer` (rows of the shard, *row), casting to its dtype."""
        if len(self._runs) * _RUNS_WORTH_LOOPING <= len(self.source):
            for source, target, length in self._runs:
                buffer[target : target + length].copy_(flat[source : source + length])
        else:
            rows = flat.index_select(0, self._source_indices(flat.device))
            buffer.index_copy_(0, self._target_indices, rows.to(buffer.device, buffer.dtype))

    def overflowed(self, flat: torch.Tensor, buffer: torch.Tensor) -> int:
        """Return how many finite values of the rows in `flat`, on the CPU, are infinite in `buffer` now.

        The stored values are looked at first, at the speed of memory; those of `flat` only if some are not finite.
        """
        if len(self._runs) * _RUNS_WORTH_LOOPING > len(self.source):
            stored = buffer.index_select(0, self._target_indices)
            return n_overflowed(flat.index_select(0, self._source_indices(flat.device)), stored)
        return sum(
            n_overflowed(flat[source : source + length], buffer[target : target + length])
            for source, target, length in self._runs
        )

    def gather(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows of `flat` (B * T, *row) in memory of their own, on its device and in `dtype`, (n, *row)."""
        return flat.index_select(0, self._source_indices(flat.device)).to(dtype)

    def gather_pattern(
        self,
        pattern_BTHK: torch.Tensor,
        buffer: torch.Tensor,
        rows: BatchRows,
        keys_of: Sequence[Indices] | None = None,
    ) -> torch.Tensor:
        """Return attention patterns so that key k is the example's k-th token, zero past its end, (n, *row).

        `keys_of` has the padded positions of each example's keys, if they are not its own tokens.

        The result has the buffer's dtype, and the pattern's device.

        Raises:
            CaptureError: An example has more tokens than a row has keys.
        """
        gathered = pattern_BTHK.new_zeros((len(self.source), *buffer.shape[1:]), dtype=buffer.dtype)
        positions, examples = self.source % rows.n_positions, rows.example_at[self.source]
        for example in np.unique(examples):
            keys = (rows.tokens_of if keys_of is None else keys_of)[example]
            if len(keys) > buffer.shape[-1]:
                raise CaptureError(
                    f"an example has {len(keys)} tokens, but rows of the pattern hold {buffer.shape[-1]}: "
                    "raise max_length to the longest example's"
                )
            picked = np.flatnonzero(examples == example)
            of_example_THK = pattern_BTHK[int(self.source[picked[0]] // rows.n_positions)]
            queries = _slice(positions[picked])
            gathered[_slice(picked), :, : len(keys)] = of_example_THK[queries][..., _slice(keys)]
        return gathered

    def copy_pattern(
        self,
        pattern_BTHK: torch.Tensor,
        buffer: torch.Tensor,
        rows: BatchRows,
        keys_of: Sequence[Indices] | None = None,
    ) -> None:
        """Copy attention patterns to `buffer` (rows of the shard, *row), as `gather_pattern` lays them out."""
        self.scatter(self.gather_pattern(pattern_BTHK, buffer, rows, keys_of), buffer)

    def scatter(self, gathered: torch.Tensor, buffer: torch.Tensor) -> None:
        """Copy gathered rows to their places in `buffer` (rows of the shard, *row), without waiting for a device."""
        for start, target, length in self._target_runs:
            buffer[target : target + length].copy_(gathered[start : start + length], non_blocking=True)

    @cached_property
    def _target_runs(self) -> list[tuple[int, int, int]]:
        """(position in this index, row in the shard, length) of each run of consecutive targets."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(self.target) != 1) + 1])
        lengths = np.diff(np.concatenate([starts, [len(self.target)]]))
        return list(zip(starts.tolist(), self.target[starts].tolist(), lengths.tolist(), strict=True))


def may_overflow(computed: torch.dtype, stored: torch.dtype) -> bool:
    """Return whether a finite value of dtype `computed` may be infinite as `stored`."""
    if not computed.is_floating_point or not stored.is_floating_point:
        return False
    return torch.finfo(stored).max < torch.finfo(computed).max


def n_overflowed(rows: torch.Tensor, stored: torch.Tensor) -> int:
    """Return how many values are finite in `rows` and infinite in `stored`, of the same shape, both on the CPU."""
    bits = stored.view(torch.int16 if stored.element_size() == 2 else torch.int32).numpy()
    if not count_nonfinite(bits, str(stored.dtype).removeprefix("torch.")):
        return 0
    return int(overflows(rows, stored))


def overflows(rows: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return how many values are finite in `rows` and infinite in `stored`, as an int64 scalar on their device."""
    return (stored.isinf() & rows.isfinite()).sum()


def _slice(indices: Indices) -> slice | list[int]:
    """Return increasing `indices` as a slice if they have no gaps: a slice needs no copy to a device."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices.tolist()


def by_position(site: str, tensor: torch.Tensor, n_examples: int, n_positions: int) -> torch.Tensor:
    """Return `tensor` as (B, T, *row); a scalar a position is a row of width 1.

    Canonical sites already have this shape. A `module:` site may have its first two axes flattened, as in
    mixture-of-experts layers, or no position axis where each row is an example (`T` is 1).

    Raises:
        CaptureError: The tensor does not hold one entry per position.
    """
    shape = tuple(tensor.shape)
    if shape == (n_examples, n_positions):
        return tensor.unsqueeze(-1)
    if shape[:2] == (n_examples, n_positions):
        return tensor
    if shape and shape[0] == n_examples * n_positions:
        return tensor.view(n_examples, n_positions, *(shape[1:] or (1,)))
    raise CaptureError(
        f"{site} gave a tensor of shape {shape} for {n_examples} examples of {n_positions} positions: it does not "
        "hold one entry per position, so it has no rows. Choose a site inside the model that does."
    )


def row_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of one row of a (B, T, *row) tensor."""
    return tuple(tensor.shape[FIRST_ROW_AXIS:])
