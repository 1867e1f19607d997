"""Encoder and decoder: which sites each has, where they are read, and whose positions the rows are."""

from typing import Any

import pytest
import torch
import transformers as hf

import residua
from residua.capture.sites.anatomy import ATTENTION_KINDS
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.sites.stacks import stacks_of
from residua.store.base.errors import CaptureError, UnknownSiteError
from tests.models.registries import build
from tests.models.tiny import TINY
from tests.models.tiny_pairs import N_DECODER, N_ENCODER, TINY_PAIRS, tiny_whisper

IDS = torch.tensor([[5, 9, 4, 7, 30, 12, 8], [3, 3, 8, 40, 9, 4, 6]])
TARGETS = torch.tensor([[2, 9, 4], [2, 8, 40]])


@pytest.mark.parametrize("name", TINY_PAIRS)
def test_both_stacks_have_their_sites(name: str) -> None:
    sites = model_sites(TINY_PAIRS[name]())
    for stack, n_layers in (("encoder", N_ENCODER), ("decoder", N_DECODER)):
        for layer in range(n_layers):
            for kind in (*ATTENTION_KINDS, "resid_pre", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post"):
                assert f"{stack}.{kind}.{layer}" in sites
        assert {f"{stack}.embed", f"{stack}.final"} <= set(sites)
        assert f"{stack}.resid_post.{n_layers}" not in sites
    for layer in range(N_DECODER):
        rows = [sites[f"decoder.{kind}.{layer}"] for kind in ("cross_q", "cross_k", "cross_v", "cross_z")]
        assert len({info.row_shape for info in rows}) == 1
        assert [info.site.row_stack for info in rows] == ["decoder", "encoder", "encoder", "decoder"]
        assert f"decoder.cross_attn_out.{layer}" in sites
        assert sites[f"decoder.cross_pattern.{layer}"].row_shape == (*(rows[0].row_shape or (0,))[:1], None)
    assert not any(name.startswith("encoder.cross_") for name in sites)
    assert sites["decoder.logits"].row_shape == (97,)


@pytest.mark.parametrize("name", ["t5", "pegasus"])
def test_what_is_read_is_what_transformers_gives(name: str) -> None:
    model = TINY_PAIRS[name]()
    seen: dict[str, torch.Tensor] = {}
    sites = "resid_*,decoder.cross_pattern.*,decoder.*_out.1"
    model.set_attn_implementation("eager")
    with residua.tap(model, sites, seen.__setitem__), torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=TARGETS, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(seen["encoder.resid_post.0"], plain.encoder_hidden_states[1])
    torch.testing.assert_close(seen["decoder.resid_post.1"], plain.decoder_hidden_states[2])
    for layer in range(N_DECODER):
        cross_BQHK = plain.cross_attentions[layer].transpose(1, 2)
        torch.testing.assert_close(seen[f"decoder.cross_pattern.{layer}"], cross_BQHK)
    parts = [seen[f"decoder.{kind}.1"] for kind in ("resid_pre", "attn_out", "cross_attn_out", "mlp_out")]
    torch.testing.assert_close(sum(parts[1:], parts[0]), plain.decoder_hidden_states[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts[0] + parts[1], seen["decoder.resid_mid.1"], atol=1e-4, rtol=1e-4)


def test_a_cross_pattern_that_is_replaced_changes_what_follows() -> None:
    model = TINY_PAIRS["bart"]()
    with torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=TARGETS).logits
        with residua.tap(model, "decoder.cross_pattern.1", lambda _, tensor: tensor):
            same = model(input_ids=IDS, decoder_input_ids=TARGETS).logits
        with residua.tap(model, "decoder.cross_z.1", lambda _, tensor: torch.zeros_like(tensor)):
            other = model(input_ids=IDS, decoder_input_ids=TARGETS).logits
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other, plain, atol=1e-2)


def test_a_decoder_over_features_has_its_sites() -> None:
    model = tiny_whisper()
    sites = model_sites(model)
    assert {"decoder.resid_post.2", "decoder.cross_k.0", "decoder.logits"} <= set(sites)
    seen: dict[str, torch.Tensor] = {}
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    with residua.tap(model, "decoder.resid_post.*", seen.__setitem__), torch.no_grad():
        plain = model(input_features=features, decoder_input_ids=TARGETS, output_hidden_states=True)
    torch.testing.assert_close(seen["decoder.resid_post.1"], plain.decoder_hidden_states[2])


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("encoder.cross_q.0", r"encoder\.resid_post\.0-1"),
        ("decoder.resid_post.9", r"decoder\.resid_post\.0-2"),
        ("vision.final", r"decoder\.final"),
    ],
)
def test_what_a_stack_lacks_is_refused_with_what_there_is(patterns: str, said: str) -> None:
    with pytest.raises(UnknownSiteError, match=said):
        resolve_sites(TINY_PAIRS["t5"](), patterns)


def test_a_model_of_one_stack_has_no_cross_attention() -> None:
    assert stacks_of(TINY["llama"]()) == ()
    with pytest.raises(UnknownSiteError, match="no encoder"):
        resolve_sites(TINY["llama"](), "cross_q.0")
    with pytest.raises(UnknownSiteError, match=r"resid_post\.0"):
        resolve_sites(TINY["llama"](), "encoder.resid_post.0")


def test_modules_of_both_stacks_are_measured() -> None:
    found = resolve_sites(TINY_PAIRS["bart"](), "module:model.encoder.layers.0.fc1,module:model.decoder.layers.0.fc1")
    assert [(info.row_shape, info.per_token) for info in found.values()] == [((40,), True), ((48,), True)]


def test_a_loop_of_its_own_records_each_stack(tmp_path: Any) -> None:
    model = TINY_PAIRS["t5"]()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    for sites, lengths in (("encoder.resid_post.*,decoder.cross_k.0", [7, 4]), ("decoder.resid_post.*", [3, 3])):
        with residua.Recorder(model, sites=sites, out=tmp_path / sites[:7], head=False) as recorder, torch.no_grad():
            model(input_ids=IDS, attention_mask=mask, decoder_input_ids=TARGETS)
        archive = residua.open(recorder.out.path)
        assert archive.examples["n_tokens"].to_pylist() == lengths
        assert archive.n_rows == sum(lengths)
    with torch.no_grad():
        alone = model(input_ids=IDS[1:, :4], decoder_input_ids=TARGETS[1:], output_hidden_states=True)
    found = torch.from_numpy(residua.open(tmp_path / "encoder").example(1)["encoder.resid_post.0"])
    torch.testing.assert_close(found, alone.encoder_hidden_states[1][0], atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(CaptureError, match=r"cross_pattern.*capture_dataset"),
        residua.Recorder(model, sites="decoder.cross_pattern.0", out=tmp_path / "c", max_length=9, head=False),
        torch.no_grad(),
    ):
        model(input_ids=IDS, decoder_input_ids=TARGETS)


def test_a_decoder_that_is_as_deep_as_its_encoder_is_not_mistaken() -> None:
    config = hf.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    sites = model_sites(hf.T5ForConditionalGeneration(config).train(False))
    assert sites["encoder.resid_post.1"].module == "encoder.block.1"
    assert sites["decoder.resid_post.1"].module == "decoder.block.1"


def test_frames_are_rows_without_tokens(tmp_path: Any) -> None:
    model = tiny_whisper()
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    assert {"encoder.q.1", "encoder.resid_post.1", "encoder.attn_out.0", "encoder.pattern.0"} <= set(model_sites(model))
    with torch.no_grad():
        plain = model(input_features=features, decoder_input_ids=TARGETS, output_hidden_states=True)
    for sites, length in (("encoder.resid_post.0,decoder.cross_v.1", 12), ("decoder.resid_post.0", 3)):
        with residua.Recorder(model, sites=sites, out=tmp_path / sites[:7], head=False), torch.no_grad():
            model(input_features=features, decoder_input_ids=TARGETS)
        archive = residua.open(tmp_path / sites[:7])
        assert archive.examples["n_rows"].to_pylist() == [length] * 2
        has_tokens = length == 3
        assert (archive.rows.token[:] == -1).all() != has_tokens
        hidden = plain.decoder_hidden_states[1] if has_tokens else plain.encoder_hidden_states[1]
        found = torch.from_numpy(archive.example(1, archive.sites[0])[archive.sites[0]])
        torch.testing.assert_close(found, hidden[1], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_attends_in_its_own_code_has_no_parts_and_its_own_patterns() -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.MvpConfig(vocab_size=97, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)  # type: ignore[arg-type]  # theirs
    model = hf.MvpForConditionalGeneration(config)
    model.train(False)
    with pytest.raises(UnknownSiteError, match=r"decoder\.mlp_out\.0.*source in its own code"):
        resolve_sites(model, "decoder.mlp_out.0")
    seen: dict[str, torch.Tensor] = {}
    model.set_attn_implementation("eager")
    with residua.tap(model, "decoder.pattern.*", seen.__setitem__), torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=TARGETS, output_attentions=True, use_cache=False)
    for layer in range(2):
        torch.testing.assert_close(seen[f"decoder.pattern.{layer}"], plain.decoder_attentions[layer].transpose(1, 2))


def test_an_embedding_that_only_the_stack_alone_runs_is_not_offered() -> None:
    model = build("vision-language", "florence2")
    sites = model_sites(model)
    assert "encoder.embed" not in sites
    assert "encoder.resid_pre.0" in sites
    with pytest.raises(UnknownSiteError, match=r"encoder\.embed.*does not run in the full model"):
        resolve_sites(model, "encoder.embed")


def test_a_decoder_is_looked_for_in_the_text_model_that_holds_both_stacks() -> None:
    model = build("vision-language", "florence2")
    assert [stack.path for stack in stacks_of(model)] == [
        "model.language_model.encoder",
        "model.language_model.decoder",
    ]
    seen: dict[str, torch.Tensor] = {}
    with residua.tap(model, "decoder.resid_post.0", seen.__setitem__), torch.no_grad():
        plain = model(input_ids=IDS, decoder_input_ids=TARGETS, output_hidden_states=True)
    torch.testing.assert_close(seen["decoder.resid_post.0"], plain.decoder_hidden_states[1])
