"""Where a replay starts: which blocks need not run, and which sites then mean nothing.

The residual stream between two blocks holds all that later blocks need of earlier ones. Rows put in there (at
``resid_pre``, ``resid_mid``, ``resid_post`` or ``final``) for every token make what lies below superfluous; any other
site is only a part of what its block hands on, and the model runs in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from residua.capture.sites.anatomy import Anatomy
from residua.store.base.errors import PlanError
from residua.store.format.site_names import LAYER_KINDS, Site, parse_site


@dataclass(frozen=True)
class Start:
    """Where stored rows go in.

    Attributes:
        sites: The sites that take them, in the model's order.
        block: The first block that has to run if every token has its row; 0 if all have to.
        site: The site that makes everything below superfluous; None if there is none.
    """

    sites: tuple[str, ...]
    block: int = 0
    site: Site | None = None

    def is_below(self, name: str, anatomy: Anatomy) -> bool:
        """Say whether nothing above depends on a site, once the stream above it is put in."""
        if self.site is None or name in self.sites:
            return False
        site = parse_site(name)
        if site.kind == "module":
            skipped = anatomy.blocks[: self.block]
            return any(f"{site.module}.".startswith(f"{path}.") for path in skipped)
        return _order(site, len(anatomy.blocks)) < _order(self.site, len(anatomy.blocks))


def start_of(sites: Sequence[str], anatomy: Anatomy) -> Start:
    """Return where a replay starts whose stored rows go in at `sites`.

    Raises:
        PlanError: Rows go in below rows that make them superfluous.
    """
    n_blocks = len(anatomy.blocks)
    streams = [site for site in map(parse_site, sites) if _first_block(site, n_blocks) is not None]
    if not streams:
        return Start(tuple(sites))
    top = max(streams, key=lambda site: _order(site, n_blocks))
    found = Start(tuple(sites), _first_block(top, n_blocks) or 0, top)
    below = [name for name in sites if name != str(top) and _order(parse_site(name), n_blocks) < _order(top, n_blocks)]
    if below:
        raise PlanError(f"rows put in at {top} make those at {below[0]} superfluous: name one of the two")
    return found


def _first_block(site: Site, n_blocks: int) -> int | None:
    if site.kind == "final":
        return n_blocks
    if site.kind == "resid_post":
        return (site.layer or 0) + 1
    return site.layer if site.kind in ("resid_pre", "resid_mid") else None


def _order(site: Site, n_blocks: int) -> tuple[int, int]:
    """Where a canonical site comes in the model; ``final`` is read right behind ``resid_post`` of the last block."""
    if site.layer is not None:
        return site.layer, LAYER_KINDS.index(site.kind)
    if site.kind == "embed":
        return -1, 0
    return (n_blocks - 1, len(LAYER_KINDS)) if site.kind == "final" else (n_blocks, 0)
