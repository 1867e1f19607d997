"""Towers that take patches cut before, or make one sequence of several images: rows against calls of the full model.

Each image also goes alone through the full model, whose blocks are hooked by hand. Where a patch lies is shown by
painting it over: the row that says so changes, and no other.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.store.base.errors import UnknownSiteError
from tests.models.registries import build
from tests.models.tiny_multimodal import MULTIMODAL
from tests.servers.s3 import S3Server

PATCH = 8
_HF: Any = hf


def _qwen(patch: int = PATCH) -> Any:
    edges = {"shortest_edge": 16 * 16, "longest_edge": 176 * 176}
    return hf.Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=edges)


PROCESSORS: Mapping[str, Callable[[], Any]] = {
    "vision-language/qwen2_vl": _qwen,
    "vision-language/qwen2_5_vl": _qwen,  # moves patches into windows
    "vision-language/qwen3_vl": _qwen,
    "vision-language/gemma4": lambda: _HF.Gemma4ImageProcessorPil(
        patch_size=PATCH, pooling_kernel_size=2, max_soft_tokens=70
    ),
    "vision-language/mistral3": lambda: _HF.PixtralImageProcessorPil(patch_size=PATCH, size={"longest_edge": 176}),
    "vision/siglip2": lambda: _HF.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=420),
}
BLOCKS = {
    "vision-language/mistral3": "model.vision_tower.transformer.layers",
    "vision/siglip2": "vision_model.encoder.layers",
    "vision-language/gemma4": "model.vision_tower.encoder.layers",
}
SITES = "vision.resid_pre.*,vision.resid_post.*,vision.mlp_out.1"


def picture(seed: int, height: int, width: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = [picture(0, 64, 64), picture(1, 160, 128), picture(2, 64, 64), picture(3, 48, 96)]


class Made:
    """A model with its processor, and a capture of all pictures."""

    def __init__(self, name: str, out: Path) -> None:
        self.name = name
        registry, _, key = name.partition("/")
        self.model = build(registry, key)
        self.processor = PROCESSORS[name]()
        self.result = residua.capture_dataset(
            self.model, PICTURES, out=out, processor=self.processor, sites=SITES, rows_per_shard=64
        )

    def alone(self, image: Image.Image) -> list[Tensor]:
        """Return what the blocks of the tower take and give for one image, in a call of the full model."""
        blocks = self.model.get_submodule(BLOCKS.get(self.name, "model.visual.blocks"))
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            taken = args[0] if args else kwargs["hidden_states"]
            seen.extend([taken.clone(), (output if isinstance(output, Tensor) else output[0]).clone()])

        handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks.children()]
        made: Any = self.processor(image, return_tensors="pt")
        full: Any = self.model
        with torch.no_grad():
            full.get_image_features(**{key: made[key] for key in made if key != "num_soft_tokens_per_image"})
        for handle in handles:
            handle.remove()
        width = seen[0].shape[-1]
        real = int(made["pixel_attention_mask"].sum()) if "pixel_attention_mask" in made else None
        real = int((made["image_position_ids"] >= 0).all(-1).sum()) if "image_position_ids" in made else real
        return [each.reshape(-1, width)[:real] for each in seen]


@pytest.fixture(scope="module", params=PROCESSORS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(request.param), tmp_path_factory.mktemp("towers") / "a.zarr")


def places_of(archive: Any) -> tuple[Any, Any, Any]:
    """Return example, row and column of each row."""
    rows = archive.rows
    example, row, column = (np.asarray(each[:]) for each in (rows.example, rows.patch_row, rows.patch_column))
    return example, row, column


def test_rows_are_those_of_single_images_in_the_full_model(made: Made) -> None:
    archive = made.result.archive
    for number, image in enumerate(PICTURES):
        wanted = made.alone(image)
        for layer in range(len(wanted) // 2):
            for kind, tensor in zip(("resid_pre", "resid_post"), wanted[2 * layer : 2 * layer + 2], strict=True):
                site = f"vision.{kind}.{layer}"
                found = torch.as_tensor(archive.example(number, site)[site])
                torch.testing.assert_close(found, tensor, atol=1e-4, rtol=1e-4)


def test_every_row_is_a_patch_with_its_place(made: Made) -> None:
    archive = made.result.archive
    example, row, column = places_of(archive)
    assert archive.rows.modality is not None
    assert set(np.asarray(archive.rows.modality[:]).tolist()) == {1}
    for number, image in enumerate(PICTURES):
        places = set(zip(row[example == number].tolist(), column[example == number].tolist(), strict=True))
        height, width = (1 + max(each) for each in zip(*places, strict=True))
        assert len(places) == height * width == (example == number).sum()
        assert abs(height / width - image.height / image.width) < 0.2


def test_a_patch_that_is_painted_over_changes_the_row_of_its_place(made: Made, tmp_path: Path) -> None:
    plain = PICTURES[1]
    site = "vision.resid_pre.0"
    painted, places = [plain], [(0, 0), (0, 3), (2, 1), (9, 7), (19, 15)]
    for row, column in places:
        values = np.array(plain)
        values[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] ^= 255
        painted.append(Image.fromarray(values))
    archive = residua.capture_dataset(
        made.model, painted, out=tmp_path / "a.zarr", processor=made.processor, sites=site
    ).archive
    example, row_of, column_of = places_of(archive)
    if made.name in ("vision/siglip2", "vision-language/gemma4"):  # their processors make the image another size
        assert row_of.max() > column_of.max() > 0
        return
    before = archive.example(0, site)[site]
    for number, place in enumerate(places, 1):
        changed = (archive.example(number, site)[site] != before).any(-1)
        of_example = example == number
        assert list(zip(row_of[of_example][changed], column_of[of_example][changed], strict=True)) == [place]


def test_what_lies_in_another_order_outside_the_blocks_is_refused() -> None:
    moving, plain = (build("vision-language", key) for key in ("qwen2_5_vl", "qwen2_vl"))
    with pytest.raises(UnknownSiteError, match=r"another order"):
        resolve_sites(moving, "vision.embed")
    assert list(resolve_sites(plain, "vision.embed")) == ["vision.embed"]


def test_a_tap_in_the_full_model_gives_the_patches_of_all_images_of_a_call() -> None:
    model, processor = MULTIMODAL["qwen2_vl"]()
    word = "<|vision_start|><|image_pad|><|vision_end|>"
    made = processor(text=[f"{word} and {word}"], images=[[PICTURES[0], PICTURES[3]]], return_tensors="pt")
    seen: dict[str, Tensor] = {}
    wanted: list[Any] = []
    handle = model.get_submodule("model.visual.blocks.1").register_forward_hook(lambda _m, _a, out: wanted.append(out))
    with torch.no_grad(), residua.tap(model, "vision.resid_post.1", seen.__setitem__):
        model(**made)
    handle.remove()
    assert torch.equal(seen["vision.resid_post.1"], wanted[-1])  # the last run; those before looked for sites
    tower = model.get_submodule("model.visual")
    with torch.no_grad(), residua.tap(tower, "resid_post.1", seen.__setitem__):
        tower(made["pixel_values"], made["image_grid_thw"])
    assert torch.equal(seen["resid_post.1"], wanted[-1])


def test_tower_and_text_model_go_into_a_bucket(s3: S3Server) -> None:
    """Rows of patches and of tokens from a bucket, against hooks and hidden states of plain calls."""
    model, processor = MULTIMODAL["qwen2_vl"]()
    word = "<|vision_start|><|image_pad|><|vision_end|>"
    rows = [
        {"text": f"what {word} is", "images": [PICTURES[3]]},
        {"text": f"{word} and {word}", "images": [PICTURES[0], PICTURES[3]]},
    ]
    given: dict[str, Any] = {"processor": processor, "image_column": "images", "storage_options": s3.options}
    sites, address = "vision.resid_post.1,resid_post.*", s3.address("both.zarr")
    result = residua.capture_dataset(model, rows, out=address, sites=sites, rows_per_shard=64, **given)
    again = residua.capture_dataset(model, rows, out=address, sites=sites, rows_per_shard=64, **given)
    assert (again.stats.rows, again.resumed) == (0, True)
    archive = residua.open(address, storage_options=s3.options)
    assert result.archive.sites == archive.sites
    seen: list[Any] = []
    states = []
    handle = model.get_submodule("model.visual.blocks.1").register_forward_hook(lambda _m, _a, out: seen.append(out))
    for row in rows:
        call = processor(text=[row["text"]], images=[row["images"]], return_tensors="pt")
        with torch.no_grad():
            states.append(model(**call, output_hidden_states=True).hidden_states[2][0])
    handle.remove()
    torch.testing.assert_close(
        torch.as_tensor(archive["vision.resid_post.1"][:]), torch.cat(seen), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.as_tensor(archive["text.resid_post.1"][:]), torch.cat(states), atol=1e-4, rtol=1e-4
    )
    table = archive.stacks["vision"].examples
    assert [table[name].to_pylist() for name in ("source_index", "source_image")] == [[0, 1, 1], [0, 0, 1]]
