"""One capture of the vision tower and the text model, compared with hooks and hidden states of plain calls."""

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
from residua.store.base.errors import DatasetError, PlanError, UnknownSiteError
from residua.store.read.stacks import StackedArchive
from tests.models.tiny_multimodal import MULTIMODAL, WITHOUT_CHATS, tokenizer
from tests.models.tiny_vision import PATCH, SIZE, build

SITES = "vision.resid_post.1,resid_post.1"
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 33, 3), dtype=np.uint8)) for seed in range(3)
]
PLACE = {"type": "image"}
ROWS: list[dict[str, Any]] = [
    {"content": [PLACE, {"type": "text", "text": "what is in"}], "images": [PICTURES[0]], "topic": "one"},
    {"content": [{"type": "text", "text": "and that one"}], "images": None, "topic": "none"},
    {"content": [PLACE, {"type": "text", "text": "and that"}, PLACE], "images": PICTURES[1:], "topic": "two"},
]
CHATS = [
    {"messages": [{"role": "user", "content": row["content"]}], "images": row["images"], "topic": row["topic"]}
    for row in ROWS
]


def tower_states(model: PreTrainedModel, calls: list[dict[str, Any]]) -> list[Tensor]:
    """Return what the second block of the vision tower gives for each image, in calls of the full model."""
    path = next(name for name, _ in model.named_modules() if "vision" in name and name.endswith("layers.1"))
    seen: list[Tensor] = []

    def keep(_module: object, _args: object, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        for call in calls:
            model(**call)
    handle.remove()
    return list(torch.cat(seen))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_tower_and_text_model_are_captured_together(name: str, tmp_path: Path) -> None:
    model, processor = MULTIMODAL[name]()
    options: dict[str, Any] = {"out": tmp_path / "a.zarr", "processor": processor, "image_column": "images"}
    archive = residua.capture_dataset(model, CHATS, sites=SITES, **options).archive
    assert isinstance(archive, StackedArchive)
    assert list(archive.stacks) == ["vision", "text"]
    calls = []
    for chat in CHATS:
        text = processor.apply_chat_template(chat["messages"])
        images = {"images": [chat["images"]]} if chat["images"] else {}
        calls.append(processor(text=[text], add_special_tokens=False, return_tensors="pt", **images))
    with torch.no_grad():
        outputs = [model(**call, output_hidden_states=True) for call in calls]
    states = torch.cat([output.hidden_states[2][0] for output in outputs])
    torch.testing.assert_close(torch.as_tensor(archive["text.resid_post.1"][:]), states, atol=1e-4, rtol=1e-4)
    expected = torch.cat(tower_states(model, [call for call in calls if "pixel_values" in call]))
    torch.testing.assert_close(torch.as_tensor(archive["vision.resid_post.1"][:]), expected, atol=1e-4, rtol=1e-4)
    table = archive.stacks["vision"].examples
    assert [table[name].to_pylist() for name in ("source_index", "source_image")] == [[0, 2, 2], [0, 0, 1]]
    assert table["topic"].to_pylist() == ["one", "two", "two"]
    again = residua.capture_dataset(model, CHATS, sites=SITES, **options)
    assert (again.stats.rows, again.resumed) == (0, True)
    given: dict[str, Any] = {"images": [PICTURES[1:]], "processor": processor, "at": "text.resid_post.1"}
    with residua.replay(model, tmp_path / "a.zarr", examples=[2], **given) as run:
        torch.testing.assert_close(run.logits[0], outputs[2].logits[0], atol=1e-4, rtol=1e-4)


def test_each_view_of_an_image_is_an_example_of_the_tower(tmp_path: Path) -> None:
    model, processor = MULTIMODAL["idefics3"]()
    options: dict[str, Any] = {"processor": processor, "image_column": "images", "batch_tokens": 40}
    archive = residua.capture_dataset(model, CHATS, sites=SITES, out=tmp_path / "a.zarr", **options).archive
    assert isinstance(archive, StackedArchive)
    calls = []
    for chat in CHATS:
        text = processor.apply_chat_template(chat["messages"])
        images = {"images": [chat["images"]]} if chat["images"] else {}
        calls.append(processor(text=[text], add_special_tokens=False, return_tensors="pt", **images))
    expected = torch.cat(tower_states(model, [call for call in calls if "pixel_values" in call]))
    torch.testing.assert_close(torch.as_tensor(archive["vision.resid_post.1"][:]), expected, atol=1e-4, rtol=1e-4)
    tower, text_rows = archive.stacks["vision"], archive.stacks["text"].rows
    n_views = {tuple(call["pixel_values"].shape[:2]) for call in calls if "pixel_values" in call}
    assert len(tower.example_table) == sum(a * b for a, b in n_views) > len(PICTURES)
    columns: list[Any] = [np.asarray(tower.examples[name].to_pylist()) for name in ("source_index", "source_image")]
    of_rows = np.asarray(tower.rows.example[:])
    assert tower.rows.view is not None
    assert text_rows.view is not None
    assert text_rows.image is not None
    views = {*zip(*(each[of_rows] for each in columns), np.asarray(tower.rows.view[:]), strict=True)}
    of_text = {
        *zip(*(np.asarray(each[:]) for each in (text_rows.example, text_rows.image, text_rows.view)), strict=True)
    }
    assert views == {each for each in of_text if each[2] >= 0}
    alone = {"out": tmp_path / "b.zarr", "processor": processor, "sites": "vision.resid_post.1", "positions": "last"}
    by_itself = residua.capture_dataset(model, [{"image": each} for each in PICTURES], **alone).archive
    assert by_itself.n_rows == len(tower.example_table)
    again = residua.capture_dataset(model, [{"image": each} for each in PICTURES], **alone)
    assert (again.stats.rows, again.resumed) == (0, True)


def test_rows_that_the_text_leaves_out_have_no_patches(tmp_path: Path) -> None:
    model, processor = WITHOUT_CHATS["llava"]()
    rows = [{"text": "<image> what" + " red" * n, "image": picture} for n, picture in enumerate(PICTURES)]
    archive = residua.capture_dataset(
        model,
        rows,
        out=tmp_path / "a.zarr",
        processor=processor,
        image_column="image",
        sites="vision.final,text.final",
        min_length=(SIZE // PATCH) ** 2 + 2,
        positions="last",
    ).archive
    assert isinstance(archive, StackedArchive)
    assert [each.examples["source_index"].to_pylist() for each in archive.stacks.values()] == [[1, 2]] * 2
    assert archive["vision.final"].shape[0] == archive["text.final"].shape[0] == 2


def test_texts_and_images_of_clip(tmp_path: Path) -> None:
    part = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    words, ids = tokenizer(), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options: dict[str, Any] = {
        "text_config": {**part, **ids, "vocab_size": len(words)},
        "vision_config": {**part, "image_size": SIZE, "patch_size": PATCH},
    }
    model = build(hf.CLIPModel, hf.CLIPConfig(**options))
    image = hf.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    rows: list[dict[str, Any]] = [
        {"caption": "what is in this" + " red" * n, "image": picture} for n, picture in enumerate(PICTURES)
    ]
    make: Any = hf.CLIPProcessor
    archive = residua.capture_dataset(
        model,
        rows,
        out=tmp_path / "a.zarr",
        processor=make(image, words),
        image_column="image",
        text_column="caption",
        sites=["text.resid_post.1", "vision.resid_post.1"],
    ).archive
    outputs = []
    for row in rows:
        pixels = image(row["image"], return_tensors="pt")["pixel_values"]
        tokens = words(row["caption"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            outputs.append(model(input_ids=tokens, pixel_values=pixels, output_hidden_states=True))
    for stack in ("text", "vision"):
        states = [getattr(output, f"{stack}_model_output").hidden_states[2][0] for output in outputs]
        torch.testing.assert_close(torch.as_tensor(archive[f"{stack}.resid_post.1"][:]), torch.cat(states))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "read once": ({"dataset": iter(CHATS)}, "read twice"),
    "no column": ({"image_column": None}, "image_column"),
    "marks of tokens": ({"positions": "column:topic"}, r"column:topic.*patches"),
    "no processor": ({"processor": None}, r"processor=transformers\.AutoImageProcessor"),
    "no words": ({"dataset": [{"images": PICTURES[:1], "topic": "one"}]}, r"row 0"),
    "no image": ({"dataset": [{"messages": "see", "images": [7]}]}, r"row 0"),
    "no such site": ({"sites": "vision.resid_post.9,resid_post.0"}, r"vision\.resid_post\.9|resid_post\.9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_both_parts_cannot_have_is_refused(case: str, tmp_path: Path) -> None:
    model, processor = MULTIMODAL["llava"]()
    options, words = WRONG[case]
    asked = {"dataset": CHATS, "image_column": "images", "sites": SITES, "processor": processor, **options}
    with pytest.raises((DatasetError, PlanError, UnknownSiteError), match=words):
        residua.capture_dataset(model, asked.pop("dataset"), out=tmp_path / "a.zarr", **asked)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tower_is_refused(tmp_path: Path) -> None:
    config = hf.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    with pytest.raises(UnknownSiteError, match=r"vision"):
        residua.capture_dataset(build(hf.LlamaForCausalLM, config), [[1, 2]], out=tmp_path / "a.zarr", sites=SITES)
    assert not list(tmp_path.iterdir())
