"""Values that the model had and that an archive does not have: overflow in a cast, and blocks that a codec gave up.

The model's own NaN and infinite values are stored as they are and count for none of this. Each shard's record has the
numbers, so that a reader knows them without reading a value.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from residua.store.base.canonical import Json
from residua.store.base.errors import few
from residua.store.encoding.codecs import INT8
from residua.store.encoding.dtypes import STORAGE_DTYPES, holds
from residua.store.encoding.lossy import BLOCK
from residua.store.format.commits import Commit
from residua.store.format.plan import Plan, SitePlan
from residua.store.sealing.packed_index import PackedIndex, file_totals

COMPUTED = "computed"
"""Entry of the provenance: the type that the model computed, for each site whose values were cast to a narrower one."""


@dataclass(frozen=True, kw_only=True)
class SiteLosses:
    """What is not finite in the stored rows of a site.

    Attributes:
        n_nonfinite: The model's own NaN and infinite values.
        n_overflowed: Finite values that the cast to the stored data type made infinite.
        n_spoiled: Finite values that the lossy codec made NaN or infinite.
        rows: The shards in which finite values were lost: the first row and the row after the last of each.
    """

    n_nonfinite: int
    n_overflowed: int
    n_spoiled: int
    rows: tuple[tuple[int, int], ...]

    @property
    def n_lost(self) -> int:
        """Finite values that a reader gets as NaN or infinite."""
        return self.n_overflowed + self.n_spoiled


def losses_of(site: SitePlan, commits: Mapping[int, Commit]) -> SiteLosses:
    """Return what is not finite in the captured rows of a site."""
    keys = [spec.key for spec in site.arrays(1)[0].file_specs]  # the same at every height
    totals = [file_totals(commits, key) for key in keys]
    n_overflowed = sum(file.n_overflowed for file in totals)
    n_spoiled = sum(file.n_spoiled for file in totals)
    return SiteLosses(
        n_nonfinite=sum(file.n_nonfinite for file in totals) - n_overflowed,
        n_overflowed=n_overflowed,
        n_spoiled=n_spoiled,
        rows=_where(commits, keys) if n_overflowed or n_spoiled else (),
    )


def _where(commits: Mapping[int, Commit], keys: list[str]) -> tuple[tuple[int, int], ...]:
    """Return the rows of the shards in which finite values were lost."""
    if isinstance(commits, PackedIndex):
        found = [commits.losses(key) for key in keys]
        shards = {
            int(loss["shard"]) for losses in found for loss in losses if loss["n_overflowed"] or loss["n_spoiled"]
        }
        return tuple(commits.rows(shard) for shard in sorted(shards))
    files = [(commit.rows, commit.arrays[key]) for _, commit in sorted(commits.items()) for key in keys]
    return tuple(dict.fromkeys(rows for rows, file in files if file.n_overflowed or file.n_spoiled))


def loss_notes(plan: Plan, commits: Mapping[int, Commit]) -> list[str]:
    """Return one sentence for each site that has lost finite values, empty for most archives."""
    return [text for site in plan.sites if (text := describe_losses(site, losses_of(site, commits)))]


def describe_losses(site: SitePlan, losses: SiteLosses) -> str:
    """Return a sentence about the finite values that a site has lost; empty if it lost none."""
    parts = []
    if losses.n_overflowed:
        parts.append(f"{losses.n_overflowed:,} finite values are infinite as {site.dtype}")
    if losses.n_spoiled and site.codec == INT8:
        parts.append(
            f"{losses.n_spoiled:,} finite values are NaN because {INT8} gives up each block of {BLOCK} values that "
            f"holds NaN or an infinity (those whose scale in {site.arrays(1)[1].path} is NaN)"
        )
    elif losses.n_spoiled:
        parts.append(f"{losses.n_spoiled:,} finite values are infinite after {site.codec}")
    if not parts:
        return ""
    where = few([f"{first:,} to {stop - 1:,}" for first, stop in losses.rows], most=4)
    wider = "bfloat16 or float32 (dtype)" if losses.n_overflowed and site.dtype == "float16" else "float32 with fast"
    return f"{site.name}: {' and '.join(parts)}, in the shards of rows {where}: store it as {wider} to keep them"


def cast_sites(sites: Iterable[SitePlan], computed: Mapping[str, str | None]) -> dict[str, Json]:
    """Return, for each site whose stored type cannot hold every value that the model computes, the computed type."""
    return {
        site.name: dtype
        for site in sites
        if (dtype := computed.get(site.name)) is not None and not holds(site.dtype, dtype)
    }


def cast_from(site: SitePlan, plan: Plan, provenance: Mapping[str, object]) -> str | None:
    """Return the data type that the values of a site were cast from; None if the stored one holds what was computed.

    An archive that does not say what was computed is taken to be of the model's own data type.
    """
    computed = provenance.get(COMPUTED)
    dtype = computed.get(site.name) if isinstance(computed, Mapping) else plan.model.get("dtype")
    if (
        not isinstance(dtype, str)
        or dtype not in STORAGE_DTYPES
        or "float" not in site.dtype
        or holds(site.dtype, dtype)
    ):
        return None
    return dtype
