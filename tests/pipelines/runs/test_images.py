"""Replays of vision-language models with the images of the capture: bit for bit, and edits against plain hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from tests.models.tiny_multimodal import MULTIMODAL


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(*parts: str) -> list[dict[str, Any]]:
    content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


ROWS: list[dict[str, Any]] = [
    {"messages": chat("image", "what is in this picture"), "images": [picture(40, 40, 0)]},
    {"messages": chat("image", "and", "image", "that one"), "images": [picture(32, 32, 1), picture(48, 16, 2)]},
    {"messages": chat("what is in"), "images": []},
]
NAMES = ("llava", "qwen2_vl", "gemma3", "idefics3")


class Captured:
    """A model with its processor, and an archive whose examples ran one by one."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.model: PreTrainedModel
        self.processor: Any
        self.model, self.processor = MULTIMODAL[name]()
        self.path = folder / "a.zarr"
        self.archive: Archive = residua.capture_dataset(
            self.model,
            ROWS,
            out=self.path,
            processor=self.processor,
            image_column="images",
            sites="resid_post.*,z.1,logits",
            batch_tokens=1,
        ).archive

    def plain(self, number: int, block: int | None = None) -> torch.Tensor:
        """Return the logits of one row by the processor's own output, with the output of a block at 0."""
        row = ROWS[number]
        images = {"images": [row["images"]]} if row["images"] else {}
        text = self.processor.apply_chat_template(row["messages"])
        made = self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)
        made.pop("labels", None)
        handles = []
        if block is not None:
            site = residua.model_sites(self.model)[f"resid_post.{block}"]
            module = self.model.get_submodule(site.module)
            halved = lambda _m, _a, out: (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2  # noqa: E731
            handles.append(module.register_forward_hook(halved))
        with torch.no_grad():
            logits: torch.Tensor = self.model(**made).logits[0]
        for handle in handles:
            handle.remove()
        return logits


@pytest.fixture(scope="module", params=NAMES)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """One capture of each model."""
    return Captured(request.param, tmp_path_factory.mktemp(request.param))


def test_rows_are_replayed_with_their_images(captured: Captured) -> None:
    for number, row in enumerate(ROWS):
        for at in (None, "resid_post.0", "z.1"):
            with residua.replay(
                captured.model,
                captured.path,
                examples=[number],
                at=at,
                images=[row["images"]],
                processor=captured.processor,
            ) as run:
                wanted = captured.archive.example(number, "logits")["logits"]
                np.testing.assert_array_equal(run.logits[0], wanted, err_msg=f"{captured.name} {number} {at}")
        edit: dict[str, Any] = {"edit": "scale", "site": "resid_post.1", "by": 0.5}
        with residua.replay(
            captured.model,
            captured.path,
            examples=[number],
            edits=[edit],
            images=[row["images"]],
            processor=captured.processor,
        ) as run:
            np.testing.assert_allclose(run.logits[0], captured.plain(number, 1), atol=2e-4, rtol=2e-4)
            assert not np.allclose(run.original_logits[0], run.logits[0], atol=1e-3)


def test_other_images_and_processors_are_refused(captured: Captured) -> None:
    right = ROWS[1]["images"]
    changed = np.array(right[0])
    changed[0, 0, 0] ^= 1
    _, other = MULTIMODAL[captured.name]()
    other.image_processor.do_rescale = False

    def replay(images: Any, processor: Any) -> Any:
        return residua.replay(captured.model, captured.path, examples=[1], images=images, processor=processor)

    for images, processor, said in (
        ([[changed, right[1]]], captured.processor, "image 0 is not"),
        ([right[::-1]], captured.processor, "image 0 is not"),
        ([right[:1]], captured.processor, "1 were given.*with 2"),
        ([right, right], captured.processor, "2 examples.*1 examples"),
        ([right], other, "other settings"),
        ([right], None, "processor"),
    ):
        with pytest.raises(PlanError, match=said), replay(images, processor):
            pass
    with pytest.raises(PlanError, match=r"images=.*processor="), replay(None, None):
        pass


def test_an_image_of_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    model, processor = MULTIMODAL["llava"]()
    path = tmp_path / "one.png"
    picture(40, 40, 5).save(path)
    rows = [{"messages": chat("image", "what is this"), "images": [{"bytes": path.read_bytes(), "path": None}]}]
    archive = residua.capture_dataset(
        model, rows, out=tmp_path / "a.zarr", processor=processor, image_column="images", sites="resid_post.0"
    ).archive
    for image in (path, str(path), path.read_bytes()):
        with residua.replay(
            model, archive, examples=[0], at="resid_post.0", images=[image], processor=processor
        ) as run:
            assert torch.isfinite(run.logits[0]).all()
    with (
        pytest.raises(PlanError, match="bytes"),
        residua.replay(model, archive, examples=[0], images=[Image.open(path)], processor=processor),
    ):
        pass
