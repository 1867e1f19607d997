"""Where a lens looks: the points of the residual stream between two blocks, counted by the blocks before them.

Depth 0 is the input of the first block, depth *l* the output of block *l* - 1, which is the input of block *l*, and the
last depth, the number of blocks, is what the final norm sees. The `tuned-lens` package numbers its translators alike.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from residua.store.base.errors import AnalysisError
from residua.store.base.untrusted import check_file
from residua.store.format.sidecars import CONFIG_FILE
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

_SHIFTS = {"resid_pre": 0, "resid_post": 1}
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
MOST_BLOCKS = 4096  # the deepest models have some hundreds
_MOST_CONFIG_BYTES = 2**24


class Points(NamedTuple):
    """What a lens is trained on: sites by depth, the site of the final residual stream, and the number of blocks."""

    sites: dict[int, str]
    final: str
    n_blocks: int
    width: int


def depth_of(site: str) -> int:
    """Return how many blocks come before `site`.

    Raises:
        AnalysisError: It is no `resid_pre` or `resid_post`.
        UnknownSiteError: It is no site.
    """
    parsed = parse_site(site)
    if parsed.layer is None or parsed.kind not in _SHIFTS:
        raise AnalysisError(
            f"a lens was asked for at {site}, but lenses decode the residual stream between blocks: choose resid_pre "
            "or resid_post sites"
        )
    return parsed.layer + _SHIFTS[parsed.kind]


def points_of(archive: Archive, sites: str | Iterable[str] | None = None) -> Points:
    """Find the points of an archive that a lens can be trained on.

    Where `final` was not captured, the output of the last block is taken for it: they are the same values. The final
    residual stream itself needs no lens and is left out.

    Args:
        archive: The archive.
        sites: Patterns of `resid_pre` and `resid_post` sites; by default all that are stored.

    Raises:
        AnalysisError: The final residual stream is not stored, or no other point is.
        UnknownSiteError: A pattern names no stored site.
    """
    stored = [site for site in archive.sites if parse_site(site).kind in _SHIFTS]
    chosen = stored if sites is None else list(archive.select(sites))
    n_blocks = count_blocks(archive)
    last = f"resid_post.{n_blocks - 1}"
    final = "final" if "final" in archive.sites else last
    if final not in archive.sites:
        raise AnalysisError(
            f"{archive.path} holds neither final nor {last}, the residual stream that a lens should lead to: capture "
            f"again with --sites 'resid_post.*'; it holds {', '.join(archive.sites)}"
        )
    by_depth = {depth_of(site): site for site in chosen if site != "final" and depth_of(site) < n_blocks}
    if not by_depth:
        raise AnalysisError(
            f"a lens needs resid_pre or resid_post sites before the final residual stream; chosen were "
            f"{', '.join(chosen) or 'none'}, and {archive.path} holds {', '.join(archive.sites)}"
        )
    (width,) = archive.plan.site(final).row_shape
    return Points(dict(sorted(by_depth.items())), final, n_blocks, width)


def count_blocks(archive: Archive) -> int:
    """Return the number of blocks that the model's config, stored in the archive, speaks of.

    Raises:
        AnalysisError: There is no such config, or it does not say it.
        DamagedArchiveError: It is not what was written.
        UnsafeArchiveError: It is far larger than a config.
    """
    name = f"head/{CONFIG_FILE}"
    path = archive.path / name
    try:
        if name in archive.metadata.files:
            check_file(archive.path, path, _MOST_CONFIG_BYTES)
        config = json.loads(archive.side_file(name) or b"")
    except (ValueError, RecursionError) as error:
        raise AnalysisError(
            f"{path} cannot be read ({error}): a lens decodes with the model's final norm and unembedding, which an "
            "archive of a causal or masked language model has in its folder head; capture such a model again"
        ) from error
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        for name in _COUNTS:
            found = part.get(name) if isinstance(part, dict) else None
            if isinstance(found, int) and 0 < found <= MOST_BLOCKS:
                return found
    raise AnalysisError(f"{path} does not say how many blocks the model has, under none of {', '.join(_COUNTS)}")
