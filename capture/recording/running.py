"""Examples that grow call by call: a loop that goes on with a cache, or ``generate`` of transformers.

An example's rows lie together in an archive, and a loop computes those of all its examples position by position. So
tokens and rows of the running examples wait in host memory until the loop is done with them, and are then recorded as
one call. Each pass of the model says where it begins, by the length of its cache; what it computes again (a pass
without a cache, candidates that were not taken) replaces what came before from the first token on that differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residua.capture.buffers.row_index import by_position
from residua.capture.recording.arguments import Bools, Ids
from residua.capture.recording.call import Call, Column
from residua.store.base.errors import CaptureError
from residua.store.base.naming import named

_CACHED_KINDS = ("k", "v")  # sites whose tensor reaches back to what is cached
_KEY_AXES = 4


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the model over some positions of the running examples.

    Attributes:
        start: The first position, padding included.
        input_ids: Token ids, (sequences, positions of the pass).
        mask: Which positions are tokens, those before the pass included, (sequences, start + positions of the pass).
    """

    start: int
    input_ids: Ids
    mask: Bools

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences, and of positions of the pass."""
        return (int(self.input_ids.shape[0]), int(self.input_ids.shape[1]))


@dataclass(eq=False, kw_only=True)
class RunningExamples:
    """The examples of a loop that is not done with them.

    Attributes:
        first: The first call, which says what the examples have beside tokens.
        keep: Which positions of the first call become rows; None for all.
        columns: Values of the examples, by name.
        most_bytes: Bytes that their rows may take.
        in_generate: Whether transformers' ``generate`` runs the loop.
    """

    first: Call
    keep: Bools | None
    columns: Mapping[str, Column]
    most_bytes: int
    in_generate: bool
    _ids: Ids = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    _mask: Bools = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _pass: Pass | None = None
    _coming: dict[str, Tensor] = field(default_factory=dict)
    _cache_sums: Tensor | None = None
    _n_bytes: int = 0

    @property
    def length(self) -> int:
        """Positions that the examples have so far, padding included."""
        return int(self._ids.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences, and of positions of the pass that runs."""
        return self._require().shape

    def begin(self, one: Pass, cache: object) -> None:
        """Begin a pass.

        Raises:
            CaptureError: It does not go on from the positions that the examples have.
        """
        self._coming = {}
        if self.length:
            self._check(one, cache)
        self._pass = one

    def _check(self, one: Pass, cache: object) -> None:
        n_sequences = len(self._ids)
        if one.shape[0] != n_sequences:
            raise CaptureError(
                f"the call goes on with {one.shape[0]} sequences, and the running examples are {n_sequences}: a call "
                "with a cache has to go on with all examples of the call before"
            )
        if one.start > self.length or (one.start < self.length and not self.in_generate):
            raise CaptureError(
                f"the cache holds {one.start} positions, and the running examples have {self.length}: the cache is of "
                "another loop, or was cut. Go on with the cache that the last call left"
            )
        if not np.array_equal(one.mask[:, : one.start], self._mask[:, : one.start]):
            raise CaptureError(
                "attention_mask says something else of the positions before this call than it did when they ran: pass "
                "the mask of the calls before, and 1 for each new token"
            )
        sums = None if self.in_generate else sums_of(cache)
        if sums is not None and self._cache_sums is not None and not torch.equal(sums, self._cache_sums):
            raise CaptureError(
                "past_key_values is not what the last call left: its examples were reordered (as beams are), chosen or "
                "replaced, so it is not clear which example each row belongs to. Go on with the examples as they were"
            )

    def put(self, site: str, kind: str, tensor: Tensor) -> None:
        """Take the tensor of a site in this pass.

        Raises:
            CaptureError: It does not have a row for each position of the pass.
        """
        one = self._require()
        if kind in _CACHED_KINDS and tensor.ndim == _KEY_AXES:
            tensor = _new_keys(tensor, one)
        try:
            self._coming[site] = by_position(site, tensor, *one.shape).to("cpu", copy=True)
        except CaptureError as error:
            hint = " generate computes logits of the last position only." if self.in_generate else ""
            raise CaptureError(f"{error}{hint}") from error

    def end(self, cache: object) -> None:
        """End a pass in which every site was put.

        Raises:
            CaptureError: The rows of the running examples take too much memory.
        """
        one = self._require()
        if not self.length:
            self._ids, self._mask = one.input_ids[:, :0], one.mask[:, :0]
        n_known = min(self.length - one.start, one.shape[1])
        differs = (self._ids[:, one.start : one.start + n_known] != one.input_ids[:, :n_known]).any(0)
        if differs.any():
            self.cut(one.start + int(np.argmax(differs)))
        n_old = self.length - one.start
        if n_old < one.shape[1]:
            self._ids = np.concatenate([self._ids, one.input_ids[:, n_old:]], axis=1)
            self._mask = one.mask
            for site, tensor in self._coming.items():
                new = tensor[:, n_old:].clone() if n_old else tensor
                self._rows.setdefault(site, []).append(new)
                self._n_bytes += new.nbytes
        self._coming, self._pass = {}, None
        self._cache_sums = None if self.in_generate else sums_of(cache)
        if self._n_bytes > self.most_bytes:
            raise CaptureError(
                f"the rows of {len(self._ids)} running examples take {self._n_bytes:,} bytes, and "
                f"{named('host_memory')} is {self.most_bytes:,}: continue fewer examples at once, record fewer sites, "
                "or raise it"
            )

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if length >= self.length:
            return
        self._ids, self._mask = self._ids[:, :length], self._mask[:, :length]
        for site, parts in self._rows.items():
            self._rows[site] = [torch.cat(parts, dim=1)[:, :length].clone()]
        self._n_bytes = sum(part.nbytes for parts in self._rows.values() for part in parts)

    def tokens(self) -> Ids:
        """Return the tokens so far, (sequences, positions)."""
        return self._ids

    def mask(self) -> Bools:
        """Return which positions so far are tokens, (sequences, positions)."""
        return self._mask

    def whole(self, input_ids: Ids, mask: Bools, ran: Bools) -> tuple[Call, Bools]:
        """Return the running examples as one call, and which of its positions become rows.

        Args:
            input_ids: Their tokens, which may be more than those that ran, (sequences, positions).
            mask: Which of them are tokens of the examples.
            ran: Which of these have rows.
        """
        keep = ran.copy()
        if self.keep is not None:
            keep[:, : self.keep.shape[1]] &= self.keep
        return Call(input_ids=input_ids, mask=mask, notes=self.first.notes), keep

    def rows(self, n_positions: int) -> dict[str, Tensor]:
        """Return the rows of each site, (sequences, positions, *row), zeros where a position has none."""
        found = {}
        for site, parts in self._rows.items():
            joined = torch.cat(parts, dim=1)
            if (n_missing := n_positions - joined.shape[1]) > 0:
                joined = torch.cat([joined, joined.new_zeros(joined.shape[0], n_missing, *joined.shape[2:])], dim=1)
            found[site] = joined[:, :n_positions]
        return found

    def _require(self) -> Pass:
        if self._pass is None:
            raise CaptureError("a site fired outside a call of the recorded model: call the model itself")
        return self._pass


def _new_keys(tensor: Tensor, one: Pass) -> Tensor:
    """Return the keys or values of a pass's own positions.

    The attention gets those of earlier positions with them: all of a growing cache, the last ones of a sliding window,
    or the room that a static cache has reserved.
    """
    n_new, end = one.shape[1], one.start + one.shape[1]
    if tensor.shape[1] == n_new:
        return tensor
    return tensor[:, one.start : end] if tensor.shape[1] >= end else tensor[:, -n_new:]


def sums_of(cache: Any) -> Tensor | None:
    """Return a number of each example that tells one cache from another; None of a cache without keys to look at."""
    layers: Sequence[Any] = getattr(cache, "layers", None) or ()
    for layer in layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == _KEY_AXES and keys.numel():
            return keys.detach().double().sum((1, 2, 3)).cpu()
    return None


def cache_of(output: Any) -> object:
    """Return the cache in what a model returned; None if there is none."""
    found = getattr(output, "past_key_values", None)
    parts = output if isinstance(output, tuple) else ()
    return found if found is not None else next((part for part in parts if hasattr(part, "get_seq_length")), None)
