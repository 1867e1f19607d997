"""How sites are stored: floats in the chosen dtype, integers exactly, patterns as wide as the longest example."""

from typing import Any

import pytest

from residua.capture.hooks.site import FLOATS, SiteInfo, plan_site, plan_sites
from residua.store.base.errors import CaptureError
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.dtypes import STORAGE_DTYPES
from residua.store.format.plan import Plan, SitePlan


def info(name: str, row_shape: tuple[int | None, ...] | None, dtype: str | None, **options: Any) -> SiteInfo:
    return SiteInfo(name=name, row_shape=row_shape, dtype=dtype, module="model.layers.0", via="output", **options)


def test_sites_keep_their_order_and_patterns_get_their_width() -> None:
    infos = {
        "pattern.0": info("pattern.0", (4, None), "bfloat16"),
        "resid_post.0": info("resid_post.0", (64,), "bfloat16"),
    }
    assert plan_sites(infos, dtype=None, codec="fast", longest_example=33) == (
        SitePlan(name="pattern.0", row_shape=(4, 33), dtype="bfloat16", codec="fast"),
        SitePlan(name="resid_post.0", row_shape=(64,), dtype="bfloat16", codec="fast"),
    )


@pytest.mark.parametrize("computed", FLOATS)
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_floats_are_stored_in_the_chosen_dtype_or_as_computed(computed: str, dtype: str | None) -> None:
    site = plan_site("resid_post.0", (8,), computed, dtype=dtype, codec="small")
    assert (site.dtype, site.codec) == (dtype or computed, "small")


@pytest.mark.parametrize("codec", PRESETS)
@pytest.mark.parametrize("computed", sorted(STORAGE_DTYPES.keys() - set(FLOATS)))
def test_integers_are_never_cast_and_stored_without_loss(computed: str, codec: str) -> None:
    site = plan_site("logits_top8.indices", (8,), computed, dtype="bfloat16", codec=codec)
    assert site.dtype == computed
    assert PRESETS[site.codec].is_lossless
    assert (site.codec == "raw") == (codec == "raw")
    Plan(model={}, dataset={}, rules={}, sites=(site,), rows_per_shard=8)


def test_one_scalar_for_each_token_is_a_row_of_width_one() -> None:
    (site,) = plan_sites(
        {"module:gate@output": info("module:gate@output", (), "float32")}, dtype=None, codec="fast", longest_example=1
    )
    assert site.row_shape == (1,)


@pytest.mark.parametrize(
    "site",
    [
        info("module:pool@output", (8,), "float32", per_token=False),
        info("module:pool@output", None, "float32"),
        info("module:pool@output", (8,), None),
    ],
)
def test_a_site_without_rows_is_refused_by_name_and_place(site: SiteInfo) -> None:
    with pytest.raises(CaptureError, match=r"module:pool@output \(model\.layers\.0 output\).*Recorder"):
        plan_sites({site.name: site}, dtype=None, codec="fast", longest_example=4)


def test_every_float_can_be_stored() -> None:
    assert set(FLOATS) <= STORAGE_DTYPES.keys()
