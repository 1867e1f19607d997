"""Rows for the edits of a run: where an edit of a replay takes stored rows, that of a run takes those without edits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from residua.capture.buffers.row_index import Indices
from residua.capture.edits.action import SiteRows
from residua.capture.edits.prepare import naming_edit
from residua.capture.hooks.site import SiteInfo
from residua.capture.layout.process_layout import spans_processes
from residua.capture.replay.engine import Replayer
from residua.capture.replay.prompts import Prompts
from residua.capture.replay.result_memory import ResultMemory
from residua.store.base.errors import PlanError
from residua.store.edits.archive_values import check_edit
from residua.store.edits.edit import Edit, Mean, Set, Swap
from residua.store.selection.tokens import TokenSelector


def unedited_rows(
    model: nn.Module, prompts: Prompts, edits: Sequence[Edit], memory: ResultMemory, **options: Any
) -> SiteRows:
    """Return the rows that edits take from the run without edits, for which the model runs here if there are any.

    A collective of all processes that hold the model.

    Args:
        model: The model.
        prompts: The examples of the run.
        edits: Its edits.
        memory: What the results of the run may take, in which the rows are counted.
        **options: For `Replayer`: `inputs` and `tensor_parallel`.

    Raises:
        PlanError: An edit does not fit; or a mean is asked for, and several processes hold the model, each of which has
            rows of its own sites; or the rows do not fit into memory.
        UnknownSiteError: The model has no such site.
    """
    bringing = [edit for edit in edits if brings_unedited_rows(edit)]
    if not bringing:
        return UneditedRows(prompts, {})
    selector = TokenSelector(prompts)
    for number, edit in enumerate(edits, start=1):
        with naming_edit(number, edit):
            check_edit(edit, selector, prompts.example_table)
    plain = Replayer(model, prompts, stored=UneditedRows(prompts, {}), **options)
    if spans_processes(plain.core) and any(isinstance(edit, Mean) for edit in bringing):
        raise PlanError(
            "a mean over the rows of this run was asked for, and several processes hold the model, each with rows of "
            "its own sites: capture the examples, and replay the archive"
        )
    sites = plain.readable_sites([site for edit in bringing for site in edit.sites])
    lengths = prompts.example_table.index().n_tokens.tolist()
    memory.take_for_edits(plain.infos(sites).values(), lengths)
    found = plain.run(plain.batch(range(len(prompts.example_table))), sites).sites
    return UneditedRows(prompts, {name: torch.cat(rows) for name, rows in found.items()})


def brings_unedited_rows(edit: Edit) -> bool:
    """Return whether an edit of a run needs rows of the run without edits."""
    if isinstance(edit, Mean | Swap):
        return edit.archive is None
    return isinstance(edit, Set) and edit.needs_stored_rows


class UneditedRows:
    """Rows of a run without edits, in memory; what `residua.capture.edits.action.SiteRows` says.

    Args:
        source: The run's examples.
        rows: From site to its rows, (rows, *row); without the sites of other processes.
    """

    def __init__(self, source: Prompts, rows: Mapping[str, Tensor]) -> None:
        self.source = source
        self._rows = rows

    def require_site(self, info: SiteInfo) -> None:
        """Do nothing: the run has the rows of every site that its edits need."""

    def require(self, site: str, rows: Indices, dtype: torch.dtype) -> None:
        """Do nothing: the rows are there, in the model's own type."""

    def read(self, site: str, rows: Indices) -> Tensor:
        """Return rows of a site, (rows, *row)."""
        return self._rows[site][torch.from_numpy(rows)]

    def means(self, site: str, classes: Sequence[Sequence[int] | None]) -> list[npt.NDArray[np.float64] | None]:
        """Return the mean of the rows of each class of examples, float64, (*row); of all rows for None."""
        values = self._rows[site].double()
        spans = [
            np.arange(len(values))
            if examples is None
            else np.concatenate([np.arange(*self.source.example_table.rows(number)) for number in examples])
            for examples in classes
        ]
        return [values[torch.from_numpy(span)].mean(0).numpy() for span in spans]

    def prefetch(self, site: str, rows: Indices) -> None:
        """Do nothing: the rows are in memory."""

    def close(self) -> None:
        """Do nothing: no file is open."""
