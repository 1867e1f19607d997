"""Ownership: which rank stores which site of which shard, where several ranks hold one replica.

Sites are divided into as many lots as there are ranks: the widest site first, each into the lot with the fewest bytes.
The lots rotate with the shards: rank r stores lot (r - s) mod n of shard s. So every file has one writer, all ranks
store about the same number of bytes even if there are few sites, and memory for one shard of every site is enough as
long as no example reaches into more shards than there are ranks.

Sites in column shards are not divided into lots: each rank stores its own columns of every shard.
"""

from collections.abc import Sequence

from residua.store.format.plan import SitePlan


class Ownership:
    """What one rank stores of the sites that all ranks of a group have.

    Args:
        sites: The sites, in the plan's order; the same on every rank.
        rank: Number of this rank in the group.
        n_ranks: Number of ranks in the group.
        has_columns: Whether this rank stores the columns of the rows (token, position, example).
    """

    def __init__(self, sites: Sequence[SitePlan], rank: int = 0, n_ranks: int = 1, *, has_columns: bool = True) -> None:
        self.n_lots = n_ranks
        self.has_columns = has_columns
        self._rank = rank
        self._sites = tuple(site for site in sites if site.column_shards == 1)
        self._column_shards = tuple(site.one_column_shard for site in sites if site.column_shards > 1)
        self._lots = _lots_of(self._sites, n_ranks)

    def lot(self, shard: int) -> int:
        """Return the lot of `shard` that this rank stores."""
        return (self._rank - shard) % self.n_lots

    @property
    def column_shard(self) -> int:
        """Number of the column shard that this rank stores."""
        return self._rank

    def sites(self, lot: int) -> tuple[SitePlan, ...]:
        """Return the sites of a lot, and the column shards that this rank stores of the other sites."""
        return (*(site for site in self._sites if self._lots[site.name] == lot), *self._column_shards)

    def owner(self, site: str, shard: int) -> int:
        """Return the rank that stores `site` of `shard`."""
        return (self._lots[site] + shard) % self.n_lots


def _lots_of(sites: Sequence[SitePlan], n_lots: int) -> dict[str, int]:
    """Return the lot of each site; sites of equal width take turns."""
    weights = [0] * n_lots
    lots = {}
    for site in sorted(sites, key=lambda site: -site.row_bytes):
        lot = weights.index(min(weights))
        weights[lot] += site.row_bytes
        lots[site.name] = lot
    return lots
