"""Going on with an archive that was begun, and ending one."""

from pathlib import Path

from torch import nn

from residua.capture.identity.provenance import changed_conditions, config_differences
from residua.store.base.errors import PlanError
from residua.store.format.create import seal
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.storage.files import sweep


def compare_plans(archive: Archive, plan: Plan, model: nn.Module) -> tuple[str, ...]:
    """Compare an archive that was begun with the plan that it would have now.

    Returns:
        One sentence for each condition that is another now.

    Raises:
        PlanError: They differ; the message says in what.
    """
    notes = changed_conditions(archive.provenance, model)
    if archive.plan.digest == plan.digest:
        return notes
    lines = archive.plan.differences(plan)
    of_config = config_differences(archive.provenance, model)
    if of_config:  # which say more than that the digests differ
        lines = [line for line in lines if not line.startswith("model.config:")] + of_config
    listed = "\n  ".join(lines)
    raise PlanError(
        f"{archive.path} was begun with another plan:\n  {listed}\n"
        "Run it with the settings of the archive to go on, or choose another --out."
    )


def sealed_archive(out: Path) -> Archive:
    """Seal the archive at `out`, of which every shard is committed, and return it."""
    sweep(out)  # a worker may have died meanwhile
    archive = Archive(out)
    seal(out, archive.metadata, archive.commits)
    return archive
