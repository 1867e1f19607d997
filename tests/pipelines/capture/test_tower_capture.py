"""Captures of vision towers and text models under their own names, compared with what they give in the full model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.capture.taps.tap import tap
from residua.store.base.errors import PlanError, UnknownSiteError
from tests.models.registries import build as built
from tests.models.tiny_multimodal import MULTIMODAL
from tests.models.tiny_vision import PATCH, SIZE, build

_PART: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_VISION: dict[str, Any] = {**_PART, "image_size": SIZE, "patch_size": PATCH}
_TEXT: dict[str, Any] = {**_PART, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DUAL: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: build(hf.CLIPModel, hf.CLIPConfig(text_config=_TEXT, vision_config=_VISION)),
    "siglip": lambda: build(hf.SiglipModel, hf.SiglipConfig(text_config=_TEXT, vision_config=_VISION)),
}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 33, 3), dtype=np.uint8)) for seed in range(3)
]
IDS = [[1, 5, 9, 2], [1, 30, 2], [1, 7, 8, 11, 40, 2]]


def images_of(name: str) -> Any:
    return (
        MULTIMODAL[name]()[1].image_processor
        if name in MULTIMODAL
        else hf.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    )


@pytest.mark.parametrize("name", ["clip", "siglip", "llava", "gemma3"])
def test_rows_of_a_tower_are_those_in_the_full_model(name: str, tmp_path: Path) -> None:
    if name in DUAL:
        model, processor = DUAL[name](), images_of(name)
    else:
        model, processor = MULTIMODAL[name]()
    sites = "vision.resid_post.*,vision.attn_out.1"
    result = residua.capture_dataset(model, PICTURES, out=tmp_path / "a.zarr", processor=processor, sites=sites)
    kept: dict[str, list[Tensor]] = {}
    with torch.no_grad(), tap(model, sites, lambda site, tensor: kept.setdefault(site, []).append(tensor.clone())):
        for picture in PICTURES:
            if name in DUAL:
                made = processor(picture, return_tensors="pt")
                model(input_ids=torch.tensor([IDS[0]]), **made)
            else:
                word = processor.image_token
                model(**processor(text=[f"{word} what is"], images=[[picture]], return_tensors="pt"))
    assert sorted(kept) == sorted(result.archive.sites)
    for site, tensors in kept.items():
        expected = torch.cat(tensors).flatten(0, 1)
        torch.testing.assert_close(torch.as_tensor(result.archive[site][:]), expected, atol=1e-4, rtol=1e-4)
    modality = result.archive.rows.modality
    assert modality is not None
    assert (np.asarray(modality[:]) == 1).sum() == len(PICTURES) * (SIZE // PATCH) ** 2
    assert any(type(model).__name__ in note for note in result.notes)


@pytest.mark.parametrize("name", DUAL)
def test_rows_of_a_text_model_are_its_tokens(name: str, tmp_path: Path) -> None:
    model = DUAL[name]()
    archive = residua.capture_dataset(model, IDS, out=tmp_path / "a.zarr", sites="text.resid_post.*").archive
    expected = []
    with torch.no_grad():
        for ids in IDS:
            inputs = torch.tensor([ids])
            states = model.get_submodule("text_model")(input_ids=inputs, output_hidden_states=True).hidden_states
            expected.append(states[2][0])
    wanted = torch.cat(expected)
    atol = 1e-5 * float(wanted.abs().max())  # batches of another size add up in another order
    torch.testing.assert_close(torch.as_tensor(archive["text.resid_post.1"][:]), wanted, atol=atol, rtol=1e-5)
    assert archive.rows.token[:].tolist() == [token for ids in IDS for token in ids]


def test_sites_that_no_part_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownSiteError, match=r"vision.*text"):
        residua.capture_dataset(DUAL["clip"](), IDS, out=tmp_path / "a.zarr", sites="resid_post.*")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["text", "vision"])
def test_attention_in_the_own_code_of_a_tower_is_read_in_the_full_model(name: str) -> None:
    model = built("vision-language", "blip")  # computes attention without transformers' interface on both sides
    projection = {"text": ".attention.output.dense", "vision": ".self_attn.projection"}[name]
    taken: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, path=path: taken.update({path: args[0].clone()}))
        for path, module in model.named_modules()
        if path.endswith(projection)
    ]
    kept: dict[str, Tensor] = {}
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), tap(model, f"{name}.z.*", lambda site, tensor: kept.update({site: tensor.clone()})):
        model(pixel_values=pixels, input_ids=torch.tensor([[1, 30, 7, 8]]))
    for handle in handles:
        handle.remove()
    assert len(kept) == len(taken) > 1
    for site, tensor in zip(kept.values(), taken.values(), strict=True):
        assert torch.equal(site.flatten(2), tensor)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("llava", "vision.resid_post.*"),
        ("gemma3", "vision.resid_post.1,resid_post.1"),
    ],
)
def test_a_recorder_refuses_rows_of_patches(name: str, sites: str, tmp_path: Path) -> None:
    """A text of as many tokens as there are patches would otherwise give patches these tokens."""
    model, _ = MULTIMODAL[name]()
    with pytest.raises((PlanError, UnknownSiteError), match=r"patches|begin each site"):
        residua.Recorder(model, out=tmp_path / "a.zarr", sites=sites)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_recorder_keeps_rows_of_tokens_of_a_call_with_images(name: str, tmp_path: Path) -> None:
    model, processor = MULTIMODAL[name]()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in"}]}]
    made = processor(text=[processor.apply_chat_template(chat)], images=[[PICTURES[0]]], return_tensors="pt")
    made.pop("labels", None)
    with residua.Recorder(model, out=tmp_path / "a.zarr", sites="resid_post.*"), torch.no_grad():
        states = model(**made, output_hidden_states=True).hidden_states
    archive = residua.open(tmp_path / "a.zarr")
    assert archive.rows.token[:].tolist() == made["input_ids"][0].tolist()
    torch.testing.assert_close(torch.as_tensor(archive["resid_post.1"][:]), states[2][0])
