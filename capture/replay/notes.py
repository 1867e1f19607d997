"""What a reader of a replay's results has to know: every way in which the run differs from the captured one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from residua.capture.edits.prepare import PreparedEdit
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.compat import attention_implementation
from residua.store.base.errors import few
from residua.store.edits.edit import Set, Swap
from residua.store.encoding.codecs import PRESETS
from residua.store.examples.memory import ExampleSource
from residua.store.format.plan import STACK_RULE, SitePlan
from residua.store.read.archive import Archive


class Reach(NamedTuple):
    """What a run reaches: how many tokens each edit changes, and how many next tokens have no logit."""

    n_changed: Sequence[int]
    n_lost: int


def reach_notes(reach: Reach, edits: Sequence[PreparedEdit], n_logits: int | None) -> list[str]:
    """Return one sentence for each edit that changes none of the tokens, and one if next tokens have no logit."""
    notes = [
        f"edit {edit.number} ({edit.edit.kind} at {', '.join(edit.edit.sites)}) changes nothing: it applies to none of "
        "the tokens that run"
        for edit, n_changed in zip(edits, reach.n_changed, strict=True)
        if not n_changed
    ]
    if reach.n_lost:
        notes.append(
            f"{reach.n_lost:,} next tokens have no loss: the LM head has {n_logits} logits, fewer than the vocabulary"
        )
    return notes


def storage_notes(source: ExampleSource, infos: Mapping[str, SiteInfo], edits: Sequence[PreparedEdit]) -> list[str]:
    """Return what is rounded, incomplete or not reproducible, whichever examples run.

    Args:
        source: The archive or the run.
        infos: The sites whose stored rows go in.
        edits: The edits.
    """
    notes = _archive_notes(source, infos) if isinstance(source, Archive) else []
    for one in [source, *(edit.source for edit in edits)]:
        if isinstance(one, Archive):
            one.captured_rows()  # raises if shards are lost
            if not one.is_sealed:
                notes.append(f"{one.path} is not sealed: {one.progress.rows:,} rows are captured so far")
    for edit in edits:
        brings_rows = isinstance(edit.edit, Set | Swap) and edit.edit.needs_stored_rows
        if brings_rows and isinstance(edit.source, Archive):
            edit.source.refuse_losses(edit.infos, f"a {edit.edit.kind}")
            notes += _rounding_notes(edit.source, edit.infos)
    if any(edit.edit.kind == "function" for edit in edits):
        notes.append("an edit is a Python function: its description is not enough to repeat this run")
    return notes


def _archive_notes(archive: Archive, infos: Mapping[str, SiteInfo]) -> list[str]:
    archive.refuse_losses(infos, "a replay")
    notes = _rounding_notes(archive, infos)
    if archive.plan.is_replay:
        notes.append(f"{archive.place} holds the results of a replay: its rows, edited there, count as unedited here")
    return notes


def _rounding_notes(archive: Archive, infos: Mapping[str, SiteInfo]) -> list[str]:
    return [
        f"{name} is stored as {site.dtype} with {site.codec}, and the model computes in {info.dtype}: rows are rounded"
        for name, info in infos.items()
        if is_rounded(site := archive.plan.site(name), info.dtype)
    ]


def is_rounded(site: SitePlan, dtype: object) -> bool:
    """Return whether stored rows may differ from the ones that a model computed in `dtype`."""
    return site.dtype != dtype or not PRESETS[site.codec].is_lossless


def attention_notes(model: PreTrainedModel, infos: Iterable[SiteInfo]) -> list[str]:
    """Return a note if the sites hold patterns and the model had to change to eager attention for them."""
    patterns = [info.name for info in infos if info.site.is_pattern]
    own = attention_implementation(model.config)
    if not patterns or own == "eager":
        return []
    return [
        f"only eager attention computes {patterns[0]}: the model ran with it instead of {own}; the last bits may differ"
    ]


def batch_note(archive: Archive, examples: Sequence[int]) -> str:
    """Return how a batch of `examples` differs from the batches of the capture; empty if it is one of them."""
    if not archive.plan.batch_tokens:
        return "the archive was recorded in a user's own loop: which examples ran together, and how, is not known"
    first, captured = examples[0], archive.batch_of(examples[0])
    if captured == tuple(examples):
        return ""
    if not captured:
        return f"example {first} has no row in the archive, and ran in no batch of the capture"
    stack = archive.plan.rules.get(STACK_RULE)
    when = f"the {stack}'s rows were captured" if stack else "it was captured"
    return (
        f"example {first} ran in another batch when {when} (examples {few(captured)}), so the last bits "
        f"may differ: examples=archive.batch_of({first}) is that batch"
    )
