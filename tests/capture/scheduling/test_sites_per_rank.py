"""Ownership: every file has one writer, and all ranks store about the same number of bytes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from residua.capture.scheduling.sites_per_rank import Ownership
from residua.store.format.plan import SitePlan


def sites(widths: list[int]) -> list[SitePlan]:
    return [
        SitePlan(name=f"resid_post.{i}", row_shape=(w,), dtype="float32", codec="raw") for i, w in enumerate(widths)
    ]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 12))
def test_every_site_of_every_shard_is_stored_by_its_owner_alone(widths: list[int], n: int, shard: int) -> None:
    plans = sites(widths)
    owners = [Ownership(plans, rank, n) for rank in range(n)]
    stored = Counter[str]()
    for rank, owner in enumerate(owners):
        mine = owner.sites(owner.lot(shard))
        assert all(other.owner(site.name, shard) == rank for site in mine for other in owners)
        stored.update(site.name for site in mine)
    assert stored == Counter({site.name: 1 for site in plans})


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(1, 5))
def test_after_as_many_shards_as_ranks_all_have_stored_the_same(widths: list[int], n: int) -> None:
    plans = sites(widths)
    owners = [Ownership(plans, rank, n) for rank in range(n)]
    totals = [sum(site.row_bytes for s in range(n) for site in owner.sites(owner.lot(s))) for owner in owners]
    assert totals == [4 * sum(widths)] * n


def test_within_one_shard_wide_sites_are_dealt_apart() -> None:
    owners = [Ownership(sites([98, 98, 98, 32, 32, 32, 32, 32, 32]), rank, 4) for rank in range(4)]
    parts = [sum(site.row_bytes for site in owner.sites(owner.lot(0))) / (4 * 486) for owner in owners]
    assert max(parts) < 0.3
