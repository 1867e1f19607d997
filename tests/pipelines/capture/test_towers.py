"""Recorders of models that need images: rows of a vision tower are whole examples, never filed under tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import residua
from residua.store.base.errors import PlanError
from tests.unlike_models import UNLIKE

N_PATCHES = 4
TOWER = {
    "llava": "module:model.vision_tower.encoder.layers.1@output",
    "clip": "module:vision_model.encoder.layers.1@output",
}


def call_of(name: str, n: int) -> dict[str, Any]:
    """Return text and images; LLaVA's texts have as many tokens as the tower has patches and a class token."""
    start = [[4] * N_PATCHES if name == "llava" else [6, 7, 8, 9]] * n
    ids = torch.cat([torch.tensor(start), torch.full((n, 1), 2)], dim=1)
    pixels = torch.randn((n, 3, 16, 16), generator=torch.Generator().manual_seed(n))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("name", TOWER)
def test_a_row_of_a_tower_is_a_whole_example(name: str, tmp_path: Path) -> None:
    model, seen = UNLIKE[name](), list[Tensor]()
    path = TOWER[name].removeprefix("module:").removesuffix("@output")
    hook = model.get_submodule(path).register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    with torch.no_grad(), residua.Recorder(model, sites=TOWER[name], out=tmp_path / "a.zarr"):
        for n in (2, 3):
            model(**call_of(name, n))
    hook.remove()
    archive = residua.open(tmp_path / "a.zarr")
    assert torch.equal(torch.as_tensor(archive[TOWER[name]][:]), torch.cat(seen))
    assert "whole example" in str(archive.provenance["notes"])


def test_one_archive_has_tokens_or_whole_examples(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="two recorders"):
        residua.Recorder(UNLIKE["llava"](), sites=[TOWER["llava"], "resid_post.1"], out=tmp_path / "a.zarr")


def test_the_text_model_of_a_model_with_images_has_a_row_for_each_token(tmp_path: Path) -> None:
    model, kwargs = UNLIKE["llava"](), call_of("llava", 2)
    with torch.no_grad():
        states = model(**kwargs, output_hidden_states=True).hidden_states
        with residua.Recorder(model, sites="resid_post.1", out=tmp_path / "a.zarr"):
            model(**kwargs)
    rows = torch.as_tensor(residua.open(tmp_path / "a.zarr")["resid_post.1"][:])
    assert torch.equal(rows, states[2].flatten(0, 1))
