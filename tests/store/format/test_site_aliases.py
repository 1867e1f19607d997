"""Names of other libraries are those of sites, and what is no site is refused with ours."""

import copy

import pytest

from residua.store.base.errors import UnknownSiteError
from residua.store.format.site_aliases import BySite, canonical
from residua.store.format.site_names import parse_site, select
from tests.store.format.test_site_names import AVAILABLE

KNOWN = {
    "blocks.3.hook_resid_pre": "resid_pre.3",
    "blocks.0.hook_resid_mid": "resid_mid.0",
    "blocks.11.hook_resid_post": "resid_post.11",
    "blocks.*.hook_resid_post": "resid_post.*",
    "blocks.0-5.hook_attn_out": "attn_out.0-5",
    "blocks.3.hook_mlp_out": "mlp_out.3",
    "blocks.3.attn.hook_rot_q": "q.3",
    "blocks.3.attn.hook_v": "v.3",
    "blocks.3.attn.hook_pattern": "pattern.3",
    "blocks.3.attn.hook_z": "z.3",
    "blocks.3.mlp.hook_post": "mlp_act.3",
    "hook_embed": "embed",
    "unembed.hook_out": "logits",
    "model.layers.3": "resid_post.3",
    "model.layers[3].output[0]": "resid_post.3",
    "model.model.layers[3].output": "resid_post.3",
    "model.layers.3.input": "resid_pre.3",
    "transformer.h.7": "resid_post.7",
    "model.transformer.h[7].output[0]": "resid_post.7",
    "h.7": "resid_post.7",
    "gpt_neox.layers.*": "resid_post.*",
    "bert.encoder.layer.2": "resid_post.2",
    "lm_head.output": "logits",
    "model.layers[3].mlp.output": "module:model.layers.3.mlp@output",
    "model.layers.3.self_attn.output[1]": "module:model.layers.3.self_attn@output.1",
    "transformer.h[3].mlp.inputs[0][0]": "module:transformer.h.3.mlp@input",
}


@pytest.mark.parametrize(("name", "ours"), KNOWN.items())
def test_names_of_other_libraries_are_understood(name: str, ours: str) -> None:
    assert canonical(name) == ours
    assert canonical(ours) == ours
    if "*" not in ours and "-" not in ours:
        assert parse_site(name) == parse_site(ours)


@pytest.mark.parametrize(
    "name", ["final", "resid_post.*", "logits_top8.values", "encoder.resid_post.3", "module:model.layers.3", "resid_.3"]
)
def test_our_own_names_stay(name: str) -> None:
    assert canonical(name) == name


def test_they_select_sites() -> None:
    assert select("blocks.3.hook_resid_post, model.layers.4", AVAILABLE) == ("resid_post.3", "resid_post.4")
    assert select("blocks.*.attn.hook_rot_q", AVAILABLE) == tuple(f"q.{layer}" for layer in range(12))
    with pytest.raises(UnknownSiteError, match=r"blocks.12.hook_resid_post.*resid_post\.12.*resid_post\.0-11"):
        select("blocks.12.hook_resid_post", AVAILABLE)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("blocks.3.attn.hook_q", r"q\.3"),
        ("blocks.3.ln1.hook_scale", "resid_post"),
        ("blocks.3.hook_resid_pots", r"resid_post\.3"),
        ("model.layers[3].mlp", "module:model.layers.3.mlp@output"),
        ("layers.3.self_attn", "module:layers.3.self_attn@output"),
        ("model.norm", "module:model.norm@output"),
    ],
)
def test_hooks_that_are_no_site_are_refused_with_ours(name: str, ours: str) -> None:
    with pytest.raises(UnknownSiteError, match=ours):
        select(name, AVAILABLE)


def test_values_by_site_are_found_by_the_names_of_other_libraries() -> None:
    values = BySite({"resid_post.3": 1, "row": 2})
    assert [values[name] for name in ("resid_post.3", "blocks.3.hook_resid_post", "model.layers.3", "row")] == [
        1,
        1,
        1,
        2,
    ]
    assert copy.copy(values)["model.layers.3"] == 1
    for name in ("blocks.2.hook_resid_post", "resid_post.2", "label"):
        with pytest.raises(KeyError, match=r"resid_post\.3, row"):
            values[name]
