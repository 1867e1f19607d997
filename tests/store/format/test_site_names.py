"""Names of sites: what parses, the path of a site, and what a pattern selects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import UnknownSiteError
from residua.store.format.site_names import Site, parse_site, select

AVAILABLE = (
    "embed",
    *(f"{kind}.{layer}" for layer in range(12) for kind in ("resid_pre", "q", "attn_out", "resid_post")),
    "final",
    "logits",
)


@pytest.mark.parametrize(
    ("text", "site", "path"),
    [
        ("resid_post.7", Site(kind="resid_post", layer=7), "sites/resid_post/7"),
        ("q.0", Site(kind="q", layer=0), "sites/q/0"),
        ("embed", Site(kind="embed"), "sites/embed"),
        (
            "logits_top8.values",
            Site(kind="logits_top8", field="values"),
            "sites/logits_top8/values",
        ),
        (
            "module:model.layers.3.mlp@output",
            Site(kind="module", module="model.layers.3.mlp", side="output"),
            "sites/module/model.layers.3.mlp@output",
        ),
        (
            "module:model.layers.3@input.1",
            Site(kind="module", module="model.layers.3", side="input", index=1),
            "sites/module/model.layers.3@input.1",
        ),
        (
            "encoder.resid_post.7",
            Site(kind="resid_post", layer=7, stack="encoder"),
            "sites/encoder/resid_post/7",
        ),
        ("decoder.cross_k.0", Site(kind="cross_k", layer=0, stack="decoder"), "sites/decoder/cross_k/0"),
        ("vision.embed", Site(kind="embed", stack="vision"), "sites/vision/embed"),
        (
            "text.logits_top8.values",
            Site(kind="logits_top8", field="values", stack="text"),
            "sites/text/logits_top8/values",
        ),
    ],
)
def test_name_site_and_path_belong_together(text: str, site: Site, path: str) -> None:
    assert parse_site(text) == site
    assert str(site) == text
    assert site.path == path


def test_a_module_means_its_output_unless_its_input_is_named() -> None:
    assert str(parse_site("module:model.norm")) == "module:model.norm@output"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post.",
        "resid_post.07",
        "resid_post.-1",
        "resid_post.1.2",
        "embed.0",
        "logits_top8",
        "logits_top0.values",
        "logits_top8.other",
        "residual.3",
        "module:",
        "module:..",
        "module:a..b",
        "module:a/b",
        "module:../x@output",
        "module:a@output.01",
        "module:a@side",
        "module:a\x00b",
        "encoder.module:a",
        "encoder.encoder.final",
        "tower.final",
        "encoder",
        "encoder.",
        "module:" + "a" * 300,
        "resid_post.1\n",
        "resid_post.١",
    ],
)
def test_other_texts_are_refused_in_the_users_words(text: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        parse_site(text)
    assert repr(text[:40])[1:-1] in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"module:[a-z./@0-9]{0,40}", fullmatch=True))
def test_every_name_that_parses_is_canonical_and_safe_as_a_path(text: str) -> None:
    try:
        site = parse_site(text)
    except UnknownSiteError:
        return
    assert parse_site(str(site)) == site
    parts = site.path.split("/")
    assert parts[0] == "sites"
    assert len(parts) in (2, 3)
    assert all(part and not part.startswith(".") and part.isascii() for part in parts)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("resid_post.3", ("resid_post.3",)),
        ("final, embed", ("embed", "final")),
        ("attn_out.2-4", ("attn_out.2", "attn_out.3", "attn_out.4")),
        (["resid_*.1", "resid_post.1"], ("resid_pre.1", "resid_post.1")),
        ("resid_post.1?", ("resid_post.10", "resid_post.11")),
        ("logits_top8,final", ("final", "logits_top8.values", "logits_top8.indices")),
        ("module:h.1.mlp,embed", ("embed", "module:h.1.mlp@output")),
    ],
)
def test_patterns_select_in_the_models_order(patterns: str | list[str], chosen: tuple[str, ...]) -> None:
    assert select(patterns, AVAILABLE) == chosen


def test_a_star_takes_every_block() -> None:
    assert select("q.*", AVAILABLE) == tuple(f"q.{layer}" for layer in range(12))


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("resid_post.12", "resid_post.0-11"),
        ("resid_post.9-12", "resid_post.0-11"),
        ("resid_post.4-2", "resid_post.0-11"),
        ("resid_post", "resid_post.*"),
        ("resid_pots.3", "resid_post"),
        ("mlp_out.*", ": embed, resid_pre.0-11, q.0-11"),
        ("", "resid_post.*"),
        ("zzz.*", "embed"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_a_hint(pattern: str, hint: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        select(pattern, AVAILABLE)
    assert pattern in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("pattern", ["module:h.1.mlp", "logits_top8", "logits_top8.values"])
def test_an_archive_has_only_what_it_lists(pattern: str) -> None:
    with pytest.raises(UnknownSiteError, match=pattern.split(".")[0]):
        select(pattern, AVAILABLE, on_demand=False)
    listed = ("embed", "logits_top8.values", "logits_top8.indices", "module:h.1.mlp@output")
    assert select(pattern, listed, on_demand=False)


def test_no_top_logits_without_logits() -> None:
    with pytest.raises(UnknownSiteError, match="logits_top8"):
        select("logits_top8", ("embed", "final"))


STACKED = (
    *(f"encoder.{name}" for name in AVAILABLE[:9]),
    *(f"decoder.{name}" for name in (*AVAILABLE[:5], "cross_q.0", "logits")),
)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resid_post.*", ("encoder.resid_post.0", "encoder.resid_post.1", "decoder.resid_post.0")),
        ("resid_post.0-1", ("encoder.resid_post.0", "encoder.resid_post.1")),
        ("encoder.q.0-1", ("encoder.q.0", "encoder.q.1")),
        ("embed", ("encoder.embed", "decoder.embed")),
        ("decoder.cross_*", ("decoder.cross_q.0",)),
        ("*.embed", ("encoder.embed", "decoder.embed")),
        ("decoder.logits_top2", ("decoder.logits_top2.values", "decoder.logits_top2.indices")),
        ("logits_top2.values", ("decoder.logits_top2.values",)),
        ("module:a.b", ("module:a.b@output",)),
        ("*", STACKED),
    ],
)
def test_a_pattern_without_a_stack_selects_in_each(pattern: str, names: tuple[str, ...]) -> None:
    assert select(pattern, STACKED) == names


@pytest.mark.parametrize("pattern", ["encoder.logits_top2", "vision.*", "encoder.cross_q.0", "resid_mid.0", "*.final"])
def test_what_no_stack_has_is_refused_with_what_there_is(pattern: str) -> None:
    with pytest.raises(UnknownSiteError, match=r"encoder\.resid_post\.0-1"):
        select(pattern, STACKED)
