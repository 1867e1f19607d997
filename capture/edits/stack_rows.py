"""The rows that a replay and its edits bring into a model: of one archive, or of one for each stack of the model."""

from collections.abc import Iterable
from functools import cached_property

from transformers import PreTrainedModel

from residua.capture.edits.action import SiteRows, StoredRows
from residua.capture.hooks.site import SiteInfo
from residua.capture.sites.stacks import PAIR_STACKS, is_encoder_decoder, row_stack, stacks_of
from residua.store.base.errors import PlanError
from residua.store.examples.memory import ExampleSource
from residua.store.format.plan import STACK_RULE
from residua.store.read.archive import Archive
from residua.store.read.stacks import archives_of, main_archive
from residua.store.selection.tokens import TokenSelector


class StackRows:
    """The rows of one stack.

    Args:
        source: Their archive or run.
        stored: Reads the rows; those of the archive unless given.

    Attributes:
        source: The archive or run.
        stack: Name of the stack; empty for a model that has one.
        stored: Reads the rows.
    """

    def __init__(self, source: ExampleSource, stored: SiteRows | None = None) -> None:
        self.source = source
        self.stack = str(source.plan.rules.get(STACK_RULE, "")) if isinstance(source, Archive) else ""
        self._stored = stored

    @cached_property
    def stored(self) -> SiteRows:
        """Reads the rows."""
        return self._stored or StoredRows(self.archive)

    @property
    def archive(self) -> Archive:
        """The archive.

        Raises:
            PlanError: The examples are those of a run.
        """
        if not isinstance(self.source, Archive):
            raise PlanError("rows of an archive were asked for, and a run has none: capture, and replay the archive")
        return self.source

    @cached_property
    def selector(self) -> TokenSelector:
        """Finds the tokens that edits name."""
        return TokenSelector(self.source)


class ModelRows:
    """The rows of every stack of a model.

    Args:
        source: The archive of the model's rows, or a run; of an encoder-decoder the folder of both stacks, or the
            archive of one.
        model: The model.
        stored: Reads the rows of a run.

    Attributes:
        main: The rows at the positions that the model's logits are of; of an archive of the encoder alone, its own.

    Raises:
        PlanError: The archive and the model do not have the same stacks, or its stacks are not of one capture.
    """

    def __init__(self, source: Archive | ExampleSource, model: PreTrainedModel, stored: SiteRows | None = None) -> None:
        if isinstance(source, Archive):
            first = main_archive(source)
            self.main = StackRows(first, stored)
            self._all = [self.main, *(StackRows(other) for other in archives_of(source) if other is not first)]
        else:
            self.main = StackRows(source, stored)
            self._all = [self.main]
        self._place = source.place
        self._encoder = next((stack for stack in stacks_of(model) if stack.name == "encoder"), None)
        _check(self.main, model)
        for one in self._all[1:]:
            same = one.archive.plan.model == self.main.archive.plan.model
            if not same or len(one.archive.example_table) != len(self.main.archive.example_table):
                raise PlanError(
                    f"{self._place}: {one.stack} and {self.main.stack} are archives of other models or examples, so "
                    "their rows do not belong together: replay one of them alone"
                )

    @property
    def sources(self) -> list[ExampleSource]:
        """The archives, the main one first; or the run."""
        return [one.source for one in self._all]

    def get(self, stack: str) -> StackRows | None:
        """Return the rows of a stack; None if the archive has none."""
        return next((one for one in self._all if one.stack == stack), None)

    def of(self, infos: Iterable[SiteInfo]) -> StackRows:
        """Return the rows of the stack that has those of all `infos`.

        Raises:
            PlanError: They are of several stacks, or of one that the archive has no rows of.
        """
        if self._encoder is None:
            return self.main
        found = {row_stack(info, self._encoder): info.name for info in infos}
        if len(found) > 1:
            raise PlanError(
                f"{' and '.join(found.values())} have rows of different stacks, {' and '.join(found)}: name sites of "
                "one stack in one edit"
            )
        stack, name = next(iter(found.items()), (self.main.stack, ""))
        rows = self.get(stack)
        if rows is None:
            raise PlanError(
                f"{name} has rows of the {stack}, and {self._place} has those of the {self.main.stack} alone: give the "
                f"folder of both archives, which a capture of sites of both stacks makes"
            )
        return rows

    def close(self) -> None:
        """Let go of what was read ahead."""
        for one in self._all:
            one.stored.close()


def _check(main: StackRows, model: PreTrainedModel) -> None:
    """Raise PlanError if an archive is of one stack of a model, and the model has none such; or the other way round."""
    name, of_pair = type(model).__name__, main.stack in PAIR_STACKS
    if of_pair == is_encoder_decoder(model):
        return
    if of_pair:
        raise PlanError(
            f"{main.source.place} has rows of the {main.stack} of an encoder-decoder, and {name} is none: use the "
            "model that was captured"
        )
    raise PlanError(
        f"{name} is an encoder-decoder, and {main.source.place} does not say of which of the two its rows are: replay "
        "what residua.capture_dataset captured of pairs, or read and replace sites with residua.tap in your own calls"
    )
