"""Names of the axes of stored arrays, as Zarr's `dimension_names` and xarray have them.

An axis of one name has one size in the complete archive, because xarray combines arrays by these names. Where sites
differ, as in a model whose layers have different numbers of heads, the axis of a later site has its size in its name.
"""

from collections.abc import Mapping

from residua.store.format.plan import Plan
from residua.store.format.site_names import parse_site

ROW = "row"
_WIDTH = ("d_model",)
_HEADS = ("head", "d_head")
_KEY_HEADS = ("key_head", "d_head")
_AXES: Mapping[str, tuple[str, ...]] = {
    "embed": _WIDTH,
    "final": _WIDTH,
    "resid_pre": _WIDTH,
    "resid_mid": _WIDTH,
    "resid_post": _WIDTH,
    "attn_out": _WIDTH,
    "mlp_out": _WIDTH,
    "mlp_act": ("d_mlp",),
    "q": _HEADS,
    "z": _HEADS,
    "k": _KEY_HEADS,
    "v": _KEY_HEADS,
    "pattern": ("head", "key"),
    "logits": ("vocabulary",),
}


def dimension_names(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return the names of the axes of every array of a plan, by its path: ``row``, then those of a row."""
    sizes: dict[str, int] = {}
    named: dict[str, tuple[str, ...]] = {spec.path: (ROW,) for spec in plan.row_arrays}
    for site in plan.sites:
        values, *scales = site.arrays(plan.rows_per_shard)
        axes = _axes(site.name, len(site.row_shape))
        named[values.path] = (ROW, *(_unique(*axis, sizes) for axis in zip(axes, values.row_shape, strict=True)))
        for spec in scales:
            blocks = _unique(f"block_of_{axes[-1]}", spec.row_shape[-1], sizes)
            named[spec.path] = (*named[values.path][:-1], blocks)
    return named


def _axes(site: str, rank: int) -> tuple[str, ...]:
    """Return the usual names of the axes of a site's row."""
    kind = parse_site(site).kind
    found = ("top",) if kind.startswith("logits_top") else _AXES.get(kind, ())
    return found if len(found) == rank else tuple(f"axis_{i}" for i in range(1, rank + 1))


def _unique(name: str, size: int, sizes: dict[str, int]) -> str:
    """Return `name`, or with its size if an axis of another size has the name already."""
    return name if sizes.setdefault(name, size) == size else f"{name}_{size}"
