"""What stands between a replay and the captured run: what is refused, and what has to be said."""

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from residua.capture.edits.prepare import EditAt
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.replay.start import Start
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.site import SiteInfo
from residua.store.base.errors import PlanError, few
from residua.store.edits.edit import Set, Swap
from residua.store.read.archive import Archive, is_replay


def check_injection(archive: Archive, name: str, info: SiteInfo) -> None:
    """Raise PlanError if the stored rows of a site cannot be put in."""
    if info.site.kind == "pattern" or info.site.top is not None or not info.per_token:
        raise PlanError(f"stored rows of {name} cannot be put in; put in those of the residual stream, q, k, v or z")
    shape = archive.plan.site(name).row_shape
    if shape != (info.row_shape or (1,)):
        raise PlanError(f"{name} has rows of shape {shape} in {archive.path}, and of {info.row_shape} in the model")


def storage_notes(archive: Archive, infos: Mapping[str, SiteInfo], edits: Sequence[EditAt]) -> list[str]:
    """Say what is not exact, not complete or not to be repeated, whichever examples run.

    Args:
        archive: The archive.
        infos: The sites whose stored rows go in.
        edits: The edits.
    """
    notes = _rounded(archive, infos)
    if is_replay(archive):
        notes.append(f"{archive.path} holds what followed a replay: its rows, edited there, count as unedited here")
    for one in [archive, *(edit.source for edit in edits)]:
        if not one.is_sealed:
            notes.append(f"{one.path} is not sealed: {one.progress.rows:,} rows are captured so far")
    for edit in edits:
        if isinstance(edit.edit, Set | Swap) and edit.edit.needs_stored_rows:
            notes += _rounded(edit.source, edit.infos)
    if any(edit.edit.kind == "function" for edit in edits):
        notes.append("an edit is a Python function: nobody can repeat this from its description")
    return notes


def attention_notes(model: PreTrainedModel, infos: Iterable[SiteInfo]) -> list[str]:
    """Say that a model runs with another attention than its own, because patterns are among the sites."""
    patterns = [info.name for info in infos if info.site.kind == "pattern"]
    own = model.config._attn_implementation
    if not patterns or own == "eager":
        return []
    return [
        f"only eager attention computes {patterns[0]}: the model ran with it instead of {own}; the last bits may differ"
    ]


def _rounded(archive: Archive, infos: Mapping[str, SiteInfo]) -> list[str]:
    return [
        f"{name} is stored as {plan.dtype} with {plan.codec}, and the model computes in {info.dtype}: rows are rounded"
        for name, info in infos.items()
        if (plan := archive.plan.site(name)).dtype != info.dtype or plan.codec not in ("raw", "fast", "small")
    ]


def why_in_full(start: Start, anatomy: Anatomy, batch: PlanBatch) -> str:
    """Say why a batch has to run in full though rows are put in; empty if its lower blocks may be left out."""
    if not start.site:
        return f"{', '.join(start.sites)} is only a part of what its block hands on, so the model ran in full" * bool(
            start.sites
        )
    short = [example for example in batch.rows if len(example.positions) < len(example.input_ids)]
    if short:
        return (
            f"example {short[0].example} has {len(short[0].positions)} of {len(short[0].input_ids)} tokens in the "
            "archive: the model ran in full, and the stored rows replaced what it computed for them"
        )
    has_experts = any(path.endswith(".experts") for path in anatomy.parts)
    if start.block and has_experts and any(len(example.input_ids) < batch.n_positions for example in batch.rows):
        return (
            f"{type(anatomy.model).__name__} ran in full: its experts take padding along with tokens, which changes "
            "the last bits, and rows of padding are not stored. Examples of equal length need no padding."
        )
    return ""


def unlike_the_plan(archive: Archive, examples: Sequence[int]) -> str:
    """Say how a batch of `examples` differs from the batches of the capture; empty if it is one of them."""
    if not archive.plan.batch_tokens or archive.plan.n_rows is None:
        return "the archive was recorded in a user's own loop: which examples ran together, and how, is not known"
    first, captured = examples[0], archive.batch_of(examples[0])
    if captured == tuple(examples):
        return ""
    if not captured:
        return f"example {first} has no row in the archive, and ran in no batch of the capture"
    return (
        f"example {first} ran in another batch when it was captured (examples {few(captured)}), so that the last bits "
        f"may differ: examples=archive.batch_of({first}) is that batch"
    )
