"""From edits to what happens at a site: one action for each edit and site, checked before the model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import ExampleRows, Indices
from residua.capture.edits.action import Action, Change, Chosen, Surroundings, name_of
from residua.capture.edits.kinds import MAKERS
from residua.capture.edits.stored_kinds import opened
from residua.capture.edits.stored_rows import StoredRows
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.sites.reference_model import whole_sites
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import PlanError, ResiduaError
from residua.store.edits.edit import Edit, Function, Mean, Scale, Swap, Zero
from residua.store.edits.selection import RowChooser
from residua.store.read.archive import Archive


def action_of(edit: Edit, info: SiteInfo, around: Surroundings) -> Action:
    """Return what `edit` does at a site; everything that can be checked beforehand is.

    Raises:
        PlanError: The edit does not fit the site: the width of a vector, a type that cannot hold it, an archive, lens
            or overlay that lacks the site or is of another plan.
    """
    if info.site.kind == "pattern" and not isinstance(edit, Zero | Scale | Function):
        raise PlanError(f"{edit.kind} does not fit {info.name}, whose rows are as long as their example; use z")
    action = MAKERS[type(edit)](edit, info, around)
    return _within(edit, info, action)


def _within(edit: Edit, info: SiteInfo, action: Action) -> Action:
    """Let an action change the chosen heads and channels only."""
    mask = part_mask(edit, info)
    if mask is None:
        return action

    def act(at: Chosen) -> Change:
        change = action(at)
        return lambda rows: torch.where(mask.to(rows.device), change(rows), rows)

    return act


def part_mask(edit: Edit, info: SiteInfo) -> Tensor | None:
    """Return which entries of a row an edit changes, as its shape; None for all of them.

    Raises:
        PlanError: The site has no heads, or not so many heads or channels.
    """
    heads, channels = edit.chosen.heads, edit.chosen.channels
    if heads is None and channels is None:
        return None
    shape = tuple(1 if size is None else size for size in info.row_shape or ())
    mask = torch.zeros(shape, dtype=torch.bool)
    if heads is not None and (len(shape) != 2 or info.site.kind == "module"):
        raise PlanError(f"{info.name} has no heads; z, q, k, v and pattern have")
    if channels is not None and info.site.kind == "pattern":
        raise PlanError(f"{info.name} has no channels: its last axis is the keys of each example")
    for name, chosen, size in (("head", heads, shape[0]), ("channel", channels, shape[-1])):
        if chosen is not None and max(chosen) >= size:
            raise PlanError(f"{info.name} has {size} {name}s: there is no {name} {max(chosen)}")
    rows = mask if heads is None else mask[list(heads)]
    rows[..., slice(None) if channels is None else list(channels)] = True
    if heads is not None:
        mask[list(heads)] = rows
    return mask


@dataclass(frozen=True, kw_only=True)
class EditAt:
    """One edit with what it does at each of its sites.

    Attributes:
        edit: The edit.
        number: Its place in the list, from 1.
        actions: From site to action.
        infos: From site to what is known of it.
        chooser: The examples that it speaks of.
        source: The archive that its rows come from, if it brings any.
    """

    edit: Edit
    number: int
    actions: Mapping[str, Action]
    infos: Mapping[str, SiteInfo]
    chooser: RowChooser
    source: Archive

    def chosen(self, batch: PlanBatch) -> Chosen:
        """Return the rows of a batch that the edit changes.

        Raises:
            PlanError: It names tokens whose rows are not stored, and needs these.
        """
        parts = [self._of_example(batch, place, example) for place, example in enumerate(batch.rows)]
        return Chosen(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _of_example(self, batch: PlanBatch, place: int, example: ExampleRows) -> dict[str, Indices]:
        tokens = np.flatnonzero(self.chooser.tokens(self.edit.chosen, example.example))
        if isinstance(self.edit, Swap):
            tokens = _paired(self.edit, example.example, tokens)
        rows = _rows_at(example.positions, example.first_row, tokens)
        from_rows = self._swapped_rows(self.edit, example, tokens) if isinstance(self.edit, Swap) else rows
        if self.edit.needs_stored_rows:
            self._refuse_missing(example, tokens[from_rows < 0])
            is_there = from_rows >= 0
            tokens, rows, from_rows = tokens[is_there], rows[is_there], from_rows[is_there]
        return {
            "source": place * batch.n_positions + example.padded[tokens],
            "example": np.full(len(tokens), example.example, np.int64),
            "position": tokens,
            "row": rows,
            "from_row": from_rows,
        }

    def _swapped_rows(self, edit: Swap, example: ExampleRows, tokens: Indices) -> Indices:
        """Rows that take the place of `tokens` of an example; -1 where there is none."""
        if not len(tokens):
            return tokens
        source = edit.source[example.example] if isinstance(edit.source, Mapping) else edit.source
        table = self.source.example_table
        if isinstance(edit.align, str):
            shift = int(table.index().n_tokens[source]) - len(example.input_ids)
            there = tokens + (shift if edit.align == "end" else 0)
        else:
            pairs = dict(edit.align)
            there = np.array([pairs[token] for token in tokens.tolist()], np.int64)
        return _rows_at(table.positions(source), table.rows(source)[0], there)

    def _refuse_missing(self, example: ExampleRows, tokens: Indices) -> None:
        """Tokens that were named have to be there; where all are meant, those that are stored are."""
        in_pairs = isinstance(self.edit, Swap) and not isinstance(self.edit.align, str)
        if len(tokens) and (in_pairs or not self.edit.chosen.is_every_token):
            where = "in the example that it takes rows from" if isinstance(self.edit, Swap) else "for it"
            raise PlanError(
                f"edit {self.number} ({self.edit.kind}) needs a stored row for position {int(tokens[0])} of example "
                f"{example.example}, and there is none {where}: choose positions that have one"
            )

    def steps(self, chosen: Chosen) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return, by site, what the edit does to the (examples, positions, *row) tensor there.

        Raises:
            PlanError: What it needs for these rows does not fit.
            NotCapturedError: What it needs is not captured yet.
        """
        return {name: self.step(name, chosen) for name in self.actions} if len(chosen.source) else {}

    def step(self, name: str, chosen: Chosen) -> Callable[[Tensor], Tensor]:
        """Return what `steps` does at one site; `chosen` holds at least one row."""
        with _titled(f"edit {self.number} ({self.edit.kind} at {name})"):
            change = self.actions[name](chosen)

        def step(tensor: Tensor) -> Tensor:
            rows = rows_at(chosen.source, tensor)
            new = change(rows)
            self._refuse_overflow(name, rows, new)
            return with_rows(chosen.source, tensor, new)

        return step

    def _refuse_overflow(self, name: str, rows: Tensor, new: Tensor) -> None:
        """Raise PlanError if finite values became infinite or NaN; what a function of the user's gives is its own."""
        if isinstance(self.edit, Function) or bool(torch.stack(torch.aminmax(new.detach())).isfinite().all()):
            return  # of which almost all pass, and soon
        if bool((new.isfinite() | ~rows.isfinite()).all()):
            return
        raise PlanError(
            f"edit {self.number} ({self.edit.kind} at {name}) goes beyond what {name_of(new.dtype)}, in which the "
            "model computes, can hold: make it smaller, or load the model in a wider type"
        )


def rows_at(source: Indices, tensor: Tensor) -> Tensor:
    """Return the rows of a (B, T, *row) tensor at increasing indices into its first two axes, (rows, *row)."""
    return tensor.flatten(0, 1) if _is_all(source, tensor) else tensor[_places(source, tensor)]


def with_rows(source: Indices, tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a (B, T, *row) tensor with other rows at increasing indices into its first two axes."""
    if _is_all(source, tensor):
        return rows.reshape(tensor.shape)
    return tensor.index_put(_places(source, tensor), rows)


def _is_all(source: Indices, tensor: Tensor) -> bool:
    return len(source) == tensor.shape[0] * tensor.shape[1]


def _places(source: Indices, tensor: Tensor) -> tuple[Tensor, Tensor]:
    example, position = np.divmod(source, tensor.shape[1])
    return torch.from_numpy(example).to(tensor.device), torch.from_numpy(position).to(tensor.device)


def _paired(edit: Swap, example: int, tokens: Indices) -> Indices:
    """Leave out the tokens that a swap names no partner for."""
    if isinstance(edit.source, Mapping) and example not in edit.source:
        return tokens[:0]
    return tokens if isinstance(edit.align, str) else tokens[np.isin(tokens, [here for here, _ in edit.align])]


def _rows_at(positions: npt.NDArray[np.int32], first_row: int, tokens: Indices) -> Indices:
    """Rows of an example's tokens; -1 for those that were not kept."""
    rows = first_row + np.searchsorted(positions, tokens)
    return np.where(np.isin(tokens, positions), rows, -1).astype(np.int64)


def edits_at(edits: Sequence[Edit], model: nn.Module, stored: StoredRows, chooser: RowChooser) -> list[EditAt]:
    """Resolve edits against a model and an archive, before anything runs.

    Raises:
        PlanError: An edit does not fit; the message says which.
        UnknownSiteError: The model has no such site.
        NotCapturedError: A mean is asked for of what is not captured yet.
    """
    found = []
    for number, edit in enumerate(edits, start=1):
        with _titled(f"edit {number} ({edit.kind})"):
            other = edit.archive if isinstance(edit, Swap | Mean) else None
            source = stored.archive if other is None else opened(other)
            chooser.check(edit, source.example_table)
            infos = whole_sites(model, list(edit.sites))
            actions = {name: _action_at(edit, info, stored, chooser) for name, info in infos.items()}
        found.append(EditAt(edit=edit, number=number, actions=actions, infos=infos, chooser=chooser, source=source))
    return found


@contextmanager
def _titled(title: str) -> Iterator[None]:
    """Say which edit an error is about."""
    try:
        yield
    except ResiduaError as error:
        raise type(error)(f"{title}: {error}") from error


def _action_at(edit: Edit, info: SiteInfo, stored: StoredRows, chooser: RowChooser) -> Action:
    if not info.per_token or info.row_shape is None or info.dtype is None or info.site.top is not None:
        raise PlanError(f"{info.name} does not hold one entry a token that could be changed; choose another site")
    dtype = torch_dtype(info.dtype)
    if not dtype.is_floating_point:
        raise PlanError(f"{info.name} holds {info.dtype}, and edits are for floating-point numbers")
    return action_of(edit, info, Surroundings(stored=stored, chooser=chooser, dtype=dtype))
