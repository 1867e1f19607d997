"""Who stores what of a replica that several ranks hold together.

Sites are dealt into as many lots as there are ranks, the widest first, each into the lightest lot. Lots go round with
the shards: of shard s, rank r has lot (r - s) mod n. So every file has one writer, ranks store about the same however
few sites there are, and memory for one shard of every site is enough as long as an example reaches into no more
shards than there are ranks.

Sites that are stored in column shards are not dealt: each rank has its own part of them, of every shard.
"""

from collections.abc import Sequence

from residua.store.format.plan import SitePlan


class Share:
    """What one of `n_ranks` ranks stores of the sites that all of them have.

    Args:
        sites: The sites, in the plan's order; the same for every rank.
        rank: Number of this rank among those that share the sites.
        n_ranks: How many there are.
        has_columns: Whether this rank stores what each row is (token, position, example).
    """

    def __init__(self, sites: Sequence[SitePlan], rank: int = 0, n_ranks: int = 1, *, has_columns: bool = True) -> None:
        self.n_lots = n_ranks
        self.has_columns = has_columns
        self._rank = rank
        self._sites = tuple(site for site in sites if site.column_shards == 1)
        self._parts = tuple(site.part for site in sites if site.column_shards > 1)
        self._lots = _dealt(self._sites, n_ranks)

    def lot(self, shard: int) -> int:
        """Return which lot of `shard` is this rank's."""
        return (self._rank - shard) % self.n_lots

    @property
    def column_shard(self) -> int:
        """Which part of the sites in column shards is this rank's."""
        return self._rank

    def sites(self, lot: int) -> tuple[SitePlan, ...]:
        """Return the sites of a lot, and the parts that this rank has of those in column shards."""
        return (*(site for site in self._sites if self._lots[site.name] == lot), *self._parts)

    def owner(self, site: str, shard: int) -> int:
        """Return the rank that stores `site` of `shard`."""
        return (self._lots[site] + shard) % self.n_lots


def _dealt(sites: Sequence[SitePlan], n_lots: int) -> dict[str, int]:
    """From site to lot; sites of one width go round."""
    weights = [0] * n_lots
    lots = {}
    for site in sorted(sites, key=lambda site: -site.row_bytes):
        lot = weights.index(min(weights))
        weights[lot] += site.row_bytes
        lots[site.name] = lot
    return lots
