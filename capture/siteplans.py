"""From what a model computes at a site to how the site is stored."""

from collections.abc import Mapping

from residua.capture.siteinfo import SiteInfo
from residua.store.codecs import DEFAULT_PRESET
from residua.store.errors import CaptureError
from residua.store.plan import SitePlan

FLOATS = ("bfloat16", "float16", "float32", "float64")


def plan_sites(
    sites: Mapping[str, SiteInfo], *, dtype: str | None, codec: str, longest_example: int
) -> tuple[SitePlan, ...]:
    """Return how each of `sites` is stored.

    Args:
        sites: What `resolve_sites` found.
        dtype: Data type for floating-point sites; None keeps what the model computes.
        codec: Codec preset for floating-point sites.
        longest_example: Length of the key axis of `pattern` sites.

    Raises:
        CaptureError: A site does not hold one entry a token, so it has no rows.
    """
    plans = []
    for name, info in sites.items():
        if info.row_shape is None or info.dtype is None or not info.per_token:
            raise CaptureError(
                f"{name} ({info.where}) does not hold one entry a token, so it has no rows. Choose a site that does, "
                "or record a model without tokens with residua.Recorder, where a row is a whole example."
            )
        shape = tuple(longest_example if size is None else size for size in info.row_shape)
        plans.append(plan_site(name, shape, info.dtype, dtype=dtype, codec=codec))
    return tuple(plans)


def plan_site(name: str, row_shape: tuple[int, ...], computed: str, *, dtype: str | None, codec: str) -> SitePlan:
    """Return how one site is stored; integer sites keep their data type and lose nothing."""
    row_shape = row_shape or (1,)
    if computed not in FLOATS:
        exact = codec if codec == "raw" else DEFAULT_PRESET
        return SitePlan(name=name, row_shape=row_shape, dtype=computed, codec=exact)
    return SitePlan(name=name, row_shape=row_shape, dtype=dtype or computed, codec=codec)
