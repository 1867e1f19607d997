"""The entry of this folder: `prepare_edits` turns edits into what happens at each site, before the model runs.

A `PreparedEdit` has one action for each of its sites. For a batch it chooses the rows (`choose`) and gives the change
to make at a site (`steps`).

Legend: `B` examples in the batch, `T` padded positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import ExampleRows, Indices
from residua.capture.edits.action import Action, Change, ChosenRows, EditContext, SiteRows, Step, dtype_name
from residua.capture.edits.kinds import ACTIONS, open_archive
from residua.capture.edits.stack_rows import StackRows
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.reference_model import unsharded_sites
from residua.store.base.errors import PlanError, ResiduaError
from residua.store.edits.archive_values import check_edit
from residua.store.edits.contents import with_lens_here
from residua.store.edits.edit import Edit, Function, Mean, Scale, Swap, Zero
from residua.store.examples.memory import ExampleSource


def prepare_edits(
    edits: Sequence[Edit], model: nn.Module, rows_of: Callable[[Iterable[SiteInfo]], StackRows]
) -> list["PreparedEdit"]:
    """Check edits against a model and an archive or run, and prepare what they do.

    Args:
        edits: The edits.
        model: The model.
        rows_of: Returns the rows of the stack that has those of some sites.

    Raises:
        PlanError: An edit does not fit; the message says which.
        UnknownSiteError: The model has no such site.
        NotCapturedError: An edit needs the mean of rows that are not captured yet.
    """
    prepared = []
    resolved: dict[tuple[str, ...], Mapping[str, SiteInfo]] = {}  # to find sites of experts takes a walk of the model
    for number, edit in enumerate(edits, start=1):
        with naming_edit(number, edit), with_lens_here(edit) as here:
            names = tuple(edit.sites)
            if names not in resolved:
                resolved[names] = unsharded_sites(model, list(names))
            infos = resolved[names]
            rows = rows_of(infos.values())
            other = edit.archive if isinstance(edit, Swap | Mean) else None
            source: ExampleSource = rows.stored.source if other is None else open_archive(other, rows.source)
            check_edit(edit, rows.selector, source.example_table)
            actions = {name: _action(here, info, rows.stored) for name, info in infos.items()}
        prepared.append(PreparedEdit(edit=edit, number=number, actions=actions, infos=infos, rows=rows, source=source))
    return prepared


def _action(edit: Edit, info: SiteInfo, stored: SiteRows) -> Action:
    """Return what an edit does at a site, limited to the heads and channels that it names."""
    if not info.per_token or info.row_shape is None or info.dtype is None or info.site.top is not None:
        raise PlanError(f"{info.name} does not hold one entry per token that could be changed; choose another site")
    dtype = torch_dtype(info.dtype)
    if not dtype.is_floating_point:
        raise PlanError(f"{info.name} holds {info.dtype}, and edits are for floating-point numbers")
    if info.site.is_pattern and not isinstance(edit, Zero | Scale | Function):
        raise PlanError(f"{edit.kind} does not fit {info.name}, whose rows are as long as their example; use z")
    action = ACTIONS[type(edit)](edit, info, EditContext(stored=stored, dtype=dtype))
    mask = _entry_mask(edit, info)
    if mask is None:
        return action

    def act(chosen: ChosenRows) -> Change:
        change = action(chosen)
        return lambda rows: torch.where(mask.to(rows.device), change(rows), rows)

    return act


def _entry_mask(edit: Edit, info: SiteInfo) -> Tensor | None:
    """Return which entries of a row an edit changes, as its shape (1 for the keys of a pattern); None for all."""
    heads, channels = edit.chosen.heads, edit.chosen.channels
    if heads is None and channels is None:
        return None
    shape = tuple(1 if size is None else size for size in info.row_shape or ())
    if heads is not None and (len(shape) != 2 or info.site.kind == "module"):
        raise PlanError(f"{info.name} has no heads; z, q, k, v and pattern have")
    if channels is not None and info.site.is_pattern:
        raise PlanError(f"{info.name} has no channels: its last axis is the keys of each example")
    mask = torch.ones(shape, dtype=torch.bool)
    for name, chosen, axis in (("head", heads, 0), ("channel", channels, -1)):
        if chosen is None:
            continue
        size = shape[axis]
        if max(chosen) >= size:
            raise PlanError(f"{info.name} has {size} {name}s: there is no {name} {max(chosen)}")
        is_chosen = torch.isin(torch.arange(size), torch.tensor(chosen))
        mask &= is_chosen if axis else is_chosen.view(size, *[1] * (len(shape) - 1))
    return mask


@dataclass(frozen=True, kw_only=True)
class PreparedEdit:
    """One edit with its action at each of its sites.

    Attributes:
        edit: The edit.
        number: Its place in the list, from 1.
        actions: From site to action.
        infos: From site to what is known of it.
        rows: The rows of the stack that its sites are of, by which it names tokens.
        source: The archive or run that its rows come from, if it brings any.
    """

    edit: Edit
    number: int
    actions: Mapping[str, Action]
    infos: Mapping[str, SiteInfo]
    rows: StackRows
    source: ExampleSource

    def choose(self, batch: PlanBatch) -> ChosenRows:
        """Return the rows of a batch that the edit changes: positions of its own stack.

        Raises:
            PlanError: The edit names tokens and needs their stored rows, and a row is not stored.
        """
        batch = batch.of_stack(self.rows.stack)
        examples = [self._choose_in(batch, place, example) for place, example in enumerate(batch.rows)]
        return ChosenRows(**{name: np.concatenate([found[name] for found in examples]) for name in examples[0]})

    def _choose_in(self, batch: PlanBatch, place: int, example: ExampleRows) -> dict[str, Indices]:
        tokens = np.flatnonzero(self.rows.selector.tokens(self.edit.chosen, example.example))
        if isinstance(self.edit, Swap):
            tokens = _with_partner(self.edit, example.example, tokens)
        rows = _rows_of_tokens(example.positions, example.first_row, tokens)
        from_rows = self._partner_rows(self.edit, example, tokens) if isinstance(self.edit, Swap) else rows
        if self.edit.needs_stored_rows:
            self._refuse_missing(example, tokens[from_rows < 0])
            is_stored = from_rows >= 0
            tokens, rows, from_rows = tokens[is_stored], rows[is_stored], from_rows[is_stored]
        return {
            "source": place * batch.n_positions + example.padded[tokens],
            "example": np.full(len(tokens), example.example, np.int64),
            "position": tokens,
            "row": rows,
            "from_row": from_rows,
        }

    def _partner_rows(self, edit: Swap, example: ExampleRows, tokens: Indices) -> Indices:
        """Return the rows that replace those of an example's tokens; -1 for each that is not stored."""
        if not len(tokens):
            return tokens
        source = edit.source[example.example] if isinstance(edit.source, Mapping) else edit.source
        table = self.source.example_table
        if isinstance(edit.align, str):
            shift = int(table.index().n_tokens[source]) - len(example.input_ids)
            partners = tokens + (shift if edit.align == "end" else 0)
        else:
            pairs = dict(edit.align)
            partners = np.array([pairs[token] for token in tokens.tolist()], np.int64)
        return _rows_of_tokens(table.positions(source), table.rows(source)[0], partners)

    def _refuse_missing(self, example: ExampleRows, tokens: Indices) -> None:
        """Raise PlanError for named tokens without a stored row; an edit of every token leaves such tokens out."""
        in_pairs = isinstance(self.edit, Swap) and not isinstance(self.edit.align, str)
        if len(tokens) and (in_pairs or not self.edit.chosen.is_every_token):
            where = "in the example that it takes rows from" if isinstance(self.edit, Swap) else "for it"
            raise PlanError(
                f"edit {self.number} ({self.edit.kind}) needs a stored row for position {int(tokens[0])} of example "
                f"{example.example}, and there is none {where}: choose positions that have one"
            )

    def steps(self, chosen: ChosenRows) -> dict[str, Step]:
        """Return the change that the edit makes at each of its sites; none if no row is chosen.

        Raises:
            PlanError: What the edit needs for these rows does not fit.
            NotCapturedError: What the edit needs is not captured yet.
        """
        return {name: self.step(name, chosen) for name in self.actions} if len(chosen.source) else {}

    def step(self, name: str, chosen: ChosenRows) -> Step:
        """Return the change at one site; `chosen` holds at least one row."""
        with naming_edit(self.number, self.edit, f" at {name}"):
            change = self.actions[name](chosen)

        def step(tensor: Tensor) -> Tensor:
            rows = _rows_at(chosen.source, tensor)
            new = change(rows)
            self._refuse_overflow(name, rows, new)
            return with_rows(chosen.source, tensor, new)

        return step

    def _refuse_overflow(self, name: str, rows: Tensor, new: Tensor) -> None:
        """Raise PlanError if finite values became infinite or NaN; a user's function may do that."""
        if isinstance(self.edit, Function) or bool(torch.stack(torch.aminmax(new.detach())).isfinite().all()):
            return  # the quick test, which almost all pass
        if bool((new.isfinite() | ~rows.isfinite()).all()):
            return
        raise PlanError(
            f"edit {self.number} ({self.edit.kind} at {name}) goes beyond what {dtype_name(new.dtype)}, in which the "
            "model computes, can hold: make it smaller, or load the model in a wider type"
        )


@contextmanager
def naming_edit(number: int, edit: Edit, at: str = "") -> Iterator[None]:
    """Put the number and kind of an edit in front of the message of an error."""
    try:
        yield
    except ResiduaError as error:
        raise type(error)(f"edit {number} ({edit.kind}{at}): {error}") from error


def _with_partner(edit: Swap, example: int, tokens: Indices) -> Indices:
    """Return the tokens for which a swap names a partner."""
    if isinstance(edit.source, Mapping) and example not in edit.source:
        return tokens[:0]
    return tokens if isinstance(edit.align, str) else tokens[np.isin(tokens, [here for here, _ in edit.align])]


def _rows_of_tokens(positions: npt.NDArray[np.int32], first_row: int, tokens: Indices) -> Indices:
    """Return the archive's rows of an example's tokens; -1 for each that was not captured."""
    rows = first_row + np.searchsorted(positions, tokens)
    return np.where(np.isin(tokens, positions), rows, -1).astype(np.int64)


def _rows_at(source: Indices, tensor: Tensor) -> Tensor:
    """Return the rows of a (B, T, *row) tensor at increasing indices into its first two axes, (rows, *row)."""
    return tensor.flatten(0, 1) if _is_every_row(source, tensor) else tensor[_axes_of(source, tensor)]


def with_rows(source: Indices, tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a (B, T, *row) tensor with other rows at increasing indices into its first two axes."""
    if _is_every_row(source, tensor):
        return rows.reshape(tensor.shape)
    return tensor.index_put(_axes_of(source, tensor), rows)


def _is_every_row(source: Indices, tensor: Tensor) -> bool:
    return len(source) == tensor.shape[0] * tensor.shape[1]


def _axes_of(source: Indices, tensor: Tensor) -> tuple[Tensor, Tensor]:
    example, position = np.divmod(source, tensor.shape[1])
    return torch.from_numpy(example).to(tensor.device), torch.from_numpy(position).to(tensor.device)
