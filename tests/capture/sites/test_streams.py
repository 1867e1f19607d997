"""Several residual streams, inputs for each layer, and keys and values that blocks share: Gemma 3n and Gemma 4."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.taps.tap import tap
from residua.store.base.errors import UnknownSiteError
from tests.unlike_models import UNLIKE, attention_weights

IDS = torch.tensor([[5, 9, 30, 7, 12, 41, 8, 3], [6, 11, 4, 77, 50, 23, 9, 10]])


def run(model: PreTrainedModel, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)


def tapped(model: PreTrainedModel, *sites: str) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with tap(model, sites, kept.__setitem__):
        run(model)
    return kept


def test_all_streams_are_in_a_row(tmp_path: Path) -> None:
    model = UNLIKE["gemma3n"]()
    sites = model_sites(model)
    assert sites["resid_post.0"].row_shape == (4, 32)
    plain = run(model, output_hidden_states=True)
    kept = tapped(model, "resid_pre.1", "resid_post.0", "resid_post.1")
    for layer in (0, 1):
        assert torch.equal(kept[f"resid_post.{layer}"].movedim(2, 0), plain.hidden_states[layer + 1])
    assert torch.equal(kept["resid_pre.1"], kept["resid_post.0"])

    rows = [{"input_ids": row.tolist()} for row in IDS]
    archive = residua.capture_dataset(
        model, rows, out=tmp_path / "a.zarr", sites="resid_post.1,logits", rows_per_shard=64
    ).archive
    assert archive["resid_post.1"].shape == (16, 4, 32)
    with residua.replay(model, archive, examples=[0, 1], at="resid_post.1") as back:
        assert torch.equal(torch.stack(list(back.logits)), plain.logits)
    block = model.get_submodule("model.layers.1")
    handle = block.register_forward_hook(lambda _m, _a, streams: torch.cat([streams[:2] * 0, streams[2:]]))
    expected = run(model).logits
    handle.remove()
    with tap(model, "resid_post.1", lambda _n, tensor: torch.cat([tensor[:, :, :2] * 0, tensor[:, :, 2:]], 2)):
        assert torch.equal(run(model).logits, expected)
    with pytest.raises(UnknownSiteError, match=r"resid_post\.2"):
        resolve_sites(model, "final")


def test_a_block_with_its_own_input_and_a_scale_of_its_stream() -> None:
    model = UNLIKE["gemma4"]()
    block = model.get_submodule("model.layers.1")
    with torch.no_grad():
        block.get_buffer("layer_scalar").fill_(0.7)
    third = "module:model.layers.1.post_per_layer_input_norm@output"
    kept = tapped(model, "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1", third)
    assert torch.equal(kept["resid_post.1"], run(model, output_hidden_states=True).hidden_states[2])
    torch.testing.assert_close(kept["resid_pre.1"] + kept["attn_out.1"], kept["resid_mid.1"])
    torch.testing.assert_close(0.7 * (kept["resid_mid.1"] + kept["mlp_out.1"] + kept[third]), kept["resid_post.1"])
    assert kept[third].abs().max() > 0


@pytest.mark.parametrize("name", ["gemma4-shared-keys", "gemma3n-shared-keys"])
def test_blocks_that_share_keys_have_them_as_they_use_them(name: str) -> None:
    model = UNLIKE[name]()
    kept = tapped(model, "q.*", "k.*", "v.*", "z.*", "pattern.*")
    for layer, source in ((2, 0), (3, 1)):  # of the same kind, sliding or full
        for kind in "kv":
            assert torch.equal(kept[f"{kind}.{layer}"], kept[f"{kind}.{source}"])
    weights = attention_weights(UNLIKE[name](), IDS)
    for layer in range(4):
        torch.testing.assert_close(kept[f"pattern.{layer}"].transpose(1, 2), weights[layer])
        v = kept[f"v.{layer}"].transpose(1, 2).repeat_interleave(2, 1)
        torch.testing.assert_close((weights[layer] @ v).transpose(1, 2), kept[f"z.{layer}"])
    plain, changes = run(model).logits, {}
    for layer in (0, 2):  # a change acts in the block that it names, and not in one that shares its keys
        with tap(model, f"v.{layer}", lambda _n, tensor: tensor * 0):
            moved = tapped(model, "z.0", "v.2", "z.2")
            changes[layer] = run(model).logits
        assert bool((moved[f"z.{layer}"] == 0).all())
        assert bool((moved["z.0" if layer else "v.2"] != 0).any())
    assert not any(torch.allclose(plain, each) for each in changes.values())
