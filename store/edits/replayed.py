"""Archives of what follows a replay: how they say so, and what cannot be done with them."""

from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive

RULE = "replay"
"""The entry of the plan's `rules`, the digest of what was replayed, and that of the provenance, which spells it out."""

COLUMN = "replayed_example"
"""The column of the example table that has the number of each example in the archive that was replayed."""


def is_replay(archive: Archive) -> bool:
    """Say whether the rows of an archive follow from stored rows and edits, and not from the model alone."""
    return RULE in archive.plan.rules


def refuse_replay(archive: Archive, job: str) -> None:
    """Raise PlanError if an archive is one of a replay, which `job` would compare with the model alone."""
    if is_replay(archive):
        raise PlanError(
            f"{archive.path} holds what followed a replay, and not what the model computes by itself, so "
            f"there is nothing that {job} could compare it with. Its provenance says what to replay: residua info"
        )
