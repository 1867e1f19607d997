"""Captures of vision-language models: rows of tokens, some of which stand for patches, beside single runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import DatasetError, PlanError
from residua.store.read.archive import Archive
from tests.models.tiny_multimodal import LAYERS, MULTIMODAL, WITHOUT_CHATS


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def message(*parts: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts],
        }
    ]


ROWS: list[dict[str, Any]] = [
    {"messages": message("image", "what is in this picture"), "images": [picture(40, 50, 0)], "label": 0},
    {"messages": message("what is in"), "images": [], "label": 1},
    {
        "messages": message("image", "and", "image", "that one"),
        "images": [picture(32, 32, 1), picture(90, 20, 2)],
        "label": 2,
    },
    {"messages": message("this", "image"), "images": [picture(64, 33, 3)], "label": 3},
]


def alone(model: PreTrainedModel, processor: Any, row: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Return tokens and hidden states of one row, by the processor's own output."""
    text = processor.apply_chat_template(row["messages"])
    images = {"images": [row["images"]]} if row["images"] else {}
    made = processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)
    made.pop("labels", None)
    with torch.no_grad():
        states = model(**made, output_hidden_states=True).hidden_states
    return made["input_ids"][0], [state[0] for state in states]


@pytest.fixture(scope="module", params=MULTIMODAL)
def captured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedModel, Any, Archive]:
    name = str(request.param)
    model, processor = MULTIMODAL[name]()
    out = tmp_path_factory.mktemp(name) / "a.zarr"
    sites = "resid_pre.0,resid_post.*,z.1"
    result = residua.capture_dataset(
        model, ROWS, out=out, processor=processor, image_column="images", sites=sites, batch_tokens=200
    )
    return name, model, processor, result.archive


def test_rows_are_those_of_single_runs(captured: tuple[str, PreTrainedModel, Any, Archive]) -> None:
    _, model, processor, archive = captured
    runs = [alone(model, processor, row) for row in ROWS]
    assert archive.rows.token[:].tolist() == torch.cat([ids for ids, _ in runs]).tolist()
    for layer in range(-1, LAYERS - 1):  # the last state follows the final norm
        site = "resid_pre.0" if layer < 0 else f"resid_post.{layer}"
        expected = torch.cat([states[layer + 1] for _, states in runs])
        torch.testing.assert_close(torch.as_tensor(archive[site][:]), expected, atol=1e-4, rtol=1e-4)
    assert archive.example_table.table(["label"])["label"].to_pylist() == [0, 1, 2, 3]


def test_rows_say_what_they_are(captured: tuple[str, PreTrainedModel, Any, Archive]) -> None:
    name, model, processor, archive = captured
    rows, config = archive.rows, model.config
    assert rows.modality is not None
    assert rows.image is not None
    assert rows.view is not None
    assert rows.patch_row is not None
    assert rows.patch_column is not None
    tokens, modality = rows.token.numpy(), rows.modality.numpy()
    image_token = getattr(config, "image_token_id", None) or config.image_token_index
    assert ((modality == 1) == (tokens == image_token)).all()
    assert set(tokens[modality == 2].tolist()) <= set(range(30))
    assert min(tokens[modality == 0].tolist()) >= 30
    third = (rows.example[:] == 2) & (modality == 1)
    assert sorted(set(rows.image[:][third].tolist())) == [0, 1]
    places = list(
        zip(
            *(each[:].tolist() for each in (rows.example, rows.image, rows.view, rows.patch_row, rows.patch_column)),
            strict=True,
        )
    )
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for (example, image, view, row, column), kind in zip(places, modality.tolist(), strict=True):
        if kind == 1:
            found.setdefault((example, image, view), []).append((row, column))
        else:
            assert (image, view, row, column) == (-1, -1, -1, -1)
    for cells in found.values():
        height, width = (max(axis) + 1 for axis in zip(*cells, strict=True))
        assert cells == [(row, column) for row in range(height) for column in range(width)]
    if name == "qwen2_vl":
        made = processor.image_processor(ROWS[3]["images"][0], return_tensors="pt")
        _, height, width = made["image_grid_thw"][0].tolist()
        assert found[3, 0, 0][-1] == (height // 2 - 1, width // 2 - 1)
    if name == "idefics3":
        assert len({view for example, _, view in found if example == 0}) == 5  # four tiles and the whole


def test_a_replay_needs_the_images(captured: tuple[str, PreTrainedModel, Any, Archive]) -> None:
    _, model, _, archive = captured
    with (
        pytest.raises(PlanError, match="pixel_values"),
        residua.replay(model, archive, at="resid_post.1", examples=[0]),
    ):
        pass


@pytest.fixture(scope="module")
def llava() -> tuple[PreTrainedModel, Any]:
    return MULTIMODAL["llava"]()


@pytest.mark.parametrize("name", WITHOUT_CHATS)
def test_texts_have_places_for_images(name: str, tmp_path: Path) -> None:
    model, processor = WITHOUT_CHATS[name]()
    texts = ["<image> what is in this", "<image> a small cat and that one"]
    rows = [{"text": text, "img": picture(32, 40, number)} for number, text in enumerate(texts)]
    archive = residua.capture_dataset(
        model, rows, out=tmp_path / "a.zarr", processor=processor, image_column="img", sites="resid_post.1"
    ).archive
    expected = []
    for row in rows:
        made = processor(text=[row["text"]], images=[[row["img"]]])
        made.pop("labels", None)
        made.convert_to_tensors("pt")
        with torch.no_grad():
            expected.append(model(**made, output_hidden_states=True).hidden_states[2][0])
    torch.testing.assert_close(torch.as_tensor(archive["resid_post.1"][:]), torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "a.zarr" / "tokenizer").is_dir()
    rows_of = archive.rows
    assert rows_of.patch_column is not None
    assert int(rows_of.patch_column[:].max()) == 3


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": "what is this", "images": [picture(8, 8, 0)]}, "<image>"),
        ({"text": "<image> this", "images": []}, "<image>"),
        ({"text": "<image> and <image>", "images": [picture(8, 8, 0)]}, "row 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "images": []}, "image column"),
        ({"messages": [{"content": "what"}], "images": []}, "role"),
        ({"messages": [{"role": "user", "text": "what"}], "images": []}, "has only role, text"),
        ({"label": 1, "images": [picture(8, 8, 0)]}, "text or messages"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    row: dict[str, Any], match: str, llava: tuple[PreTrainedModel, Any], tmp_path: Path
) -> None:
    model, processor = llava
    with pytest.raises(DatasetError, match=match):
        residua.capture_dataset(
            model, [row], out=tmp_path / "a.zarr", processor=processor, image_column="images", sites="resid_post.0"
        )


def test_a_processor_without_a_tokenizer_is_refused(llava: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    model, processor = llava
    for given in (None, processor.image_processor):
        with pytest.raises(PlanError, match="AutoProcessor"):
            residua.capture_dataset(model, ROWS, out=tmp_path / "a.zarr", processor=given, image_column="images")
