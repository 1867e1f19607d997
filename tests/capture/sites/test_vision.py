"""Sites of models over images: found as those of language models, and proved by a run on pixels."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import model_sites, resolve_sites
from residua.capture.sites.pixels import patch_grid
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError
from tests.models import registries
from tests.models.tiny_vision import FIRST_PATCH, GRID, LAYERS, PATCH, SIZE, VISION, build, pixels

PARTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module", params=VISION)
def named(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    name = str(request.param)
    return name, VISION[name]()


def run(model: PreTrainedModel, sites: str, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Return what a tap sees of some sites, and the output of a run on two images without any tap."""
    kept: dict[str, Tensor] = {}
    images = pixels(2)
    with torch.no_grad(), tap(model, sites, lambda name, tensor: kept.update({name: tensor.clone()})):
        model(images)
    with torch.no_grad():
        return kept, model(images, **options)


def test_the_residual_stream_is_that_of_hidden_states(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    kept, output = run(model, "resid_pre.*,resid_post.*", output_hidden_states=True)
    assert len(kept) == 2 * LAYERS
    for layer in range(LAYERS - (name == "yolos")):  # the last state of YOLOS follows the final norm
        assert torch.equal(kept[f"resid_pre.{layer}"], output.hidden_states[layer])
        assert torch.equal(kept[f"resid_post.{layer}"], output.hidden_states[layer + 1])


def test_parts_add_up(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    if name == "beit":  # a vector of the block scales what the modules give
        with pytest.raises(UnknownSiteError, match=r"attn_out.*module:"):
            resolve_sites(model, "attn_out.1")
        return
    kept, _ = run(model, ",".join(f"{kind}.1" for kind in PARTS))
    before, attention, middle, mlp, after = (kept[f"{kind}.1"] for kind in PARTS)
    torch.testing.assert_close(middle, before + attention)
    torch.testing.assert_close(after, middle + mlp)


def test_attention_is_that_of_eager_attention(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    kept, _ = run(model, "q.1,k.1,v.1,z.1,pattern.1")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights_BHQK = model(pixels(2), output_attentions=True).attentions[1]
    model.set_attn_implementation("sdpa")
    pattern_BQHK, value_BKHD = kept["pattern.1"], kept["v.1"]
    torch.testing.assert_close(pattern_BQHK, weights_BHQK.transpose(1, 2))
    torch.testing.assert_close(torch.einsum("bqhk,bkhd->bqhd", pattern_BQHK, value_BKHD), kept["z.1"])
    if name != "beit":  # it adds a bias of the relative position
        score_BHQK = torch.einsum("bqhd,bkhd->bhqk", kept["q.1"], kept["k.1"]) * kept["q.1"].shape[-1] ** -0.5
        torch.testing.assert_close(score_BHQK.softmax(-1), weights_BHQK)


def test_each_patch_has_its_place(named: tuple[str, PreTrainedModel]) -> None:
    name, model = named
    grid = patch_grid(model, (3, SIZE, SIZE))
    assert (grid.first, grid.n_rows, grid.n_columns) == (FIRST_PATCH.get(name, 1), GRID, GRID)
    row, column = 2, 1
    images = pixels(1).repeat(2, 1, 1, 1)
    images[1, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] *= -1
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), tap(model, "resid_pre.0", kept.__setitem__):
        model(images)
    changed = (kept["resid_pre.0"][0] != kept["resid_pre.0"][1]).any(-1)
    assert torch.nonzero(changed).flatten().tolist() == [grid.first + row * GRID + column]
    assert kept["resid_pre.0"].shape[1] == grid.n_positions


def test_sites_have_the_shape_that_a_row_has(named: tuple[str, PreTrainedModel]) -> None:
    sites = model_sites(named[1])
    assert sites["resid_post.1"].row_shape == (32,)
    assert sites["pattern.0"].row_shape == (4, None)
    assert "logits" not in sites


@pytest.mark.parametrize(("height", "width"), [(SIZE, 2 * SIZE), (3 * PATCH, 5 * PATCH)])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "dinov2_with_registers"])
def test_images_of_other_sizes_have_other_grids(name: str, height: int, width: int) -> None:
    model = VISION[name]()
    grid = patch_grid(model, (3, height, width))
    assert (grid.n_rows, grid.n_columns) == (height // PATCH, width // PATCH)
    assert grid.n_positions == FIRST_PATCH.get(name, 1) + grid.n_rows * grid.n_columns


@pytest.mark.parametrize(
    ("make", "config", "why"),
    [
        (hf.ViTMAEModel, hf.ViTMAEConfig(**SMALL, image_size=SIZE, patch_size=PATCH), "4 x 4 patches"),
        (hf.VivitModel, hf.VivitConfig(**SMALL, image_size=SIZE), "patch_size"),
        (hf.ResNetModel, hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]), "module:"),
    ],
)
def test_models_without_a_position_for_each_patch_are_refused(make: Any, config: Any, why: str) -> None:
    model = build(make, config)
    with pytest.raises(UnknownSiteError, match=why):
        resolve_sites(model, "resid_post.*")
    with pytest.raises(CaptureError, match=type(model).__name__):
        patch_grid(model, (3, SIZE, SIZE))


def test_a_recorder_refuses_rows_of_patches(tmp_path: Any) -> None:
    with pytest.raises(PlanError, match=r"resid_post\.0.*capture_dataset"):
        residua.Recorder(VISION["vit"](), sites="resid_post.0", out=tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("mllama", r"MllamaVisionModel takes aspect_ratio_ids and aspect_ratio_mask beside images"),
        ("minicpmv4_6", r"takes target_sizes beside images"),
        (
            "got_ocr2",
            r"first block of GotOcr2VisionEncoder takes \(\d+, 4, 4, 64\), and not \(images, positions, width\)",
        ),
    ],
)
def test_a_tower_without_rows_says_why_and_what_works(name: str, cause: str) -> None:
    model = registries.build("vision-language", name)
    with pytest.raises(UnknownSiteError, match=rf"vision\.resid_post\.0.*{cause}") as caught:
        resolve_sites(model, "vision.resid_post.0")
    example = str(caught.value).partition("use module: sites, for example '")[2].partition("'")[0]
    assert "vision" in example
    assert list(resolve_sites(model, example)) == [example]
