"""Captures of models over images: rows of patches, compared with runs of the model on what its processor gives."""

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
import zarr
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.reproduce import reproduce
from residua.store.base.errors import DamagedArchiveError, DatasetError, PlanError
from residua.store.examples.table import ExampleTable
from residua.store.selection.row_filter import RowFilter
from tests.models.tiny import TINY
from tests.models.tiny_vision import FIRST_PATCH, GRID, PATCH, SIZE, VISION

SIZES = ((40, 50), (32, 32), (90, 20), (64, 64), (33, 70))


def picture(height: int, width: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def processor(**settings: Any) -> Any:
    return hf.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, **settings)


def states_of(model: PreTrainedModel, images: Sequence[Image.Image], made: Any, **options: Any) -> list[Tensor]:
    """Return the hidden states of every image, each run alone: per image (layers + 1, positions, width)."""
    with torch.no_grad():
        outputs = [
            model(**made(image, return_tensors="pt"), output_hidden_states=True, **options).hidden_states
            for image in images
        ]
    return [torch.stack([state[0] for state in states]) for states in outputs]


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_with_registers", "siglip_vision", "clip_vision", "beit"])
def test_rows_are_the_hidden_states_of_single_images(name: str, tmp_path: Path) -> None:
    model, made = VISION[name](), processor()
    rows = [{"image": image, "label": number} for number, image in enumerate(PICTURES)]
    out = tmp_path / "a.zarr"
    result = residua.capture_dataset(model, rows, out=out, processor=made, batch_tokens=50)
    expected = torch.cat(states_of(model, PICTURES, made), 1)
    archive = result.archive
    for layer in range(3):
        wanted = expected[layer + 1]
        atol = 1e-5 * float(wanted.abs().max())  # batches of another size add up in another order
        torch.testing.assert_close(torch.as_tensor(archive[f"resid_post.{layer}"][:]), wanted, atol=atol, rtol=1e-5)
    assert archive.example_table.table(["label"])["label"].to_pylist() == list(range(len(SIZES)))
    group: Any = zarr.open_group(out, mode="r")
    first = FIRST_PATCH.get(name, 1)
    of_one = [2] * first + [1] * GRID**2
    assert group["rows/modality"][:].tolist() == of_one * len(SIZES)
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    found = list(zip(group["rows/patch_row"][:].tolist(), group["rows/patch_column"][:].tolist(), strict=True))
    assert found == ([(-1, -1)] * first + places) * len(SIZES)
    assert set(group["rows/token"][:].tolist()) == {-1}
    assert group["rows/modality"].attrs["residua"]["values"] == ["text", "image", "special"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_of_different_sizes_have_different_grids(name: str, tmp_path: Path) -> None:
    model, made = VISION[name](), processor(do_resize=False)
    sizes = [(32, 32), (16, 40), (40, 16), (32, 32), (24, 24)]
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    archive = residua.capture_dataset(model, images, out=tmp_path / "a.zarr", processor=made).archive
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    expected = [
        states_of(model, [image], made, **(options if image.size != (SIZE, SIZE) else {}))[0][2] for image in images
    ]
    torch.testing.assert_close(torch.as_tensor(archive["resid_post.1"][:]), torch.cat(expected))
    lengths = [1 + (height // PATCH) * (width // PATCH) for height, width in sizes]
    assert archive.example_table.index().n_tokens.tolist() == lengths
    rows = archive.rows
    assert rows.patch_row is not None
    assert rows.patch_column is not None
    last = np.cumsum(lengths) - 1
    assert [int(rows.patch_row[int(row)]) for row in last] == [height // PATCH - 1 for height, _ in sizes]
    assert [int(rows.patch_column[int(row)]) for row in last] == [width // PATCH - 1 for _, width in sizes]


def test_patterns_modules_and_filters(tmp_path: Path) -> None:
    model, made = VISION["vit"](), processor()
    sites = "pattern.1,module:vit.layers.1.mlp@output"
    out = tmp_path / "a.zarr"
    archive = residua.capture_dataset(model, PICTURES, out=out, processor=made, sites=sites, drop_special=True).archive
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [
            model(**made(image, return_tensors="pt"), output_attentions=True).attentions[1] for image in PICTURES
        ]
    expected = torch.cat(weights).transpose(1, 2)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(torch.as_tensor(archive["pattern.1"][:]), expected)
    assert archive["module:vit.layers.1.mlp@output"].shape == (len(SIZES) * GRID**2, 32)
    corner = RowFilter.parse("patch_row == 0 and patch_column == 0 and modality == 'image'").rows(archive)
    assert corner.tolist() == [number * GRID**2 for number in range(len(SIZES))]
    assert not RowFilter.parse("modality == 'special'").rows(archive).size


def test_a_dataset_may_give_bytes_paths_and_pixels(tmp_path: Path) -> None:
    model, made = VISION["deit"](), processor()
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for number, image in enumerate(PICTURES):
        (folder / "inner" / f"{number}.png").write_bytes(encoded(image))
    lines = [json.dumps({"image": f"inner/{number}.png"}) for number in range(len(PICTURES))]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    table = datasets.Dataset.from_dict({"image": PICTURES}, features=datasets.Features(image=datasets.Image()))
    given: dict[str, Any] = {
        "pixels": PICTURES,
        "arrays": [{"image": np.asarray(image)} for image in PICTURES],
        "bytes": [{"img": encoded(image)} for image in PICTURES],
        "jsonl": folder / "rows.jsonl",
        "datasets": table,
        "folder": folder / "inner",
    }
    expected = torch.cat(states_of(model, PICTURES, made), 1)[1]
    digests: dict[str, Any] = {}
    for kind, dataset in given.items():
        out = tmp_path / f"{kind}.zarr"
        archive = residua.capture_dataset(model, dataset, out=out, processor=made, sites="resid_post.0").archive
        torch.testing.assert_close(torch.as_tensor(archive["resid_post.0"][:]), expected)
        digests[kind] = archive.plan.dataset["digest"]
    assert digests["pixels"] == digests["arrays"]
    assert len({digests[kind] for kind in ("bytes", "jsonl")}) == 1
    assert digests["pixels"] != digests["bytes"]


def test_a_capture_is_resumed_with_the_same_images_only(tmp_path: Path) -> None:
    model, made, out = VISION["deit"](), processor(), tmp_path / "a.zarr"
    options: dict[str, Any] = {"out": out, "sites": "resid_post.1", "rows_per_shard": 32, "batch_tokens": 20}

    def stop(stats: Any) -> None:
        if stats.committed_rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        residua.capture_dataset(model, PICTURES, processor=made, on_batch=stop, **options)
    with pytest.raises(PlanError, match="digest"):
        residua.capture_dataset(model, PICTURES[::-1], processor=made, **options)
    with pytest.raises(PlanError, match="processor"):
        residua.capture_dataset(model, PICTURES, processor=processor(do_normalize=False), **options)
    result = residua.capture_dataset(model, PICTURES, processor=made, **options)
    assert result.resumed
    expected = torch.cat(states_of(model, PICTURES, made), 1)[2]
    torch.testing.assert_close(torch.as_tensor(result.archive["resid_post.1"][:]), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_what_an_archive_without_pixels_cannot_do_is_refused(tmp_path: Path) -> None:
    model, made, out = VISION["vit"](), processor(), tmp_path / "a.zarr"
    archive = residua.capture_dataset(model, PICTURES, out=out, processor=made).archive
    archive.example_table.verify()
    with pytest.raises(PlanError, match="images"), residua.replay(model, archive, at="resid_post.1", examples=[0]):
        pass
    with pytest.raises(PlanError, match="images"):
        reproduce(model, out)


def test_a_changed_digest_of_an_image_is_damage(tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    residua.capture_dataset(VISION["deit"](), PICTURES, out=out, processor=processor(), sites="resid_post.1")
    part = out / "examples" / "part-00000.parquet"
    table = pq.read_table(part)
    others = [["ab" * 32]] * len(PICTURES)
    at = table.schema.get_field_index("image_sha256")
    pq.write_table(table.set_column(at, table.schema.field(at), [others]), part)
    with pytest.raises(DamagedArchiveError, match="altered"):
        ExampleTable(out / "examples").verify()


@pytest.mark.parametrize(
    ("dataset", "options", "match"),
    [
        ([{"text": "a"}], {}, "image_column"),
        ([{"image": PICTURES[0]}], {"image_column": "picture"}, "picture"),
        ([{"image": [PICTURES[0], PICTURES[1]]}], {}, "2 images"),
        ([{"image": 5}], {}, r"row 0.*int"),
        ([{"image": b"no image"}], {}, r"row 0.*format"),
        ([{"image": encoded(PICTURES[0])[:-40]}], {}, r"row 0.*decoded"),
        ([{"image": picture(300, 300, 0)}], {"max_image_pixels": 80_000}, r"90|300"),
        ([{"image": encoded(picture(300, 300, 0))}], {"max_image_pixels": 80_000}, "max_image_pixels"),
        ([{"image": Image.new("I;16", (40, 40))}], {}, "I;16"),
        ([{"image": np.zeros((4, 4, 4), np.float32)}], {}, "float32"),
        ([{"image": "a.png"}], {}, "image_folder"),
        ([{"image": "https://example.com/a.png"}], {"image_folder": "."}, "address"),
        ([{"image": PICTURES[0]}], {"long_examples": "truncate"}, "truncate"),
        ([{"image": PICTURES[0]}], {"max_length": 5}, r"row 0.*18 tokens.*5"),
        ([{"image": None}], {}, "no example"),
        ([{"image": PICTURES[0], "image_sha256": "x"}], {}, "image_sha256"),
    ],
)
def test_what_is_no_image_or_does_not_fit_is_refused(
    dataset: Any, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=match):
        residua.capture_dataset(MODEL, dataset, out=tmp_path / "a.zarr", processor=processor(), **options)
    assert not list(tmp_path.iterdir())


MODEL = VISION["deit"]()


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "/etc/hostname", "inner", "nothing.png", "a\0b.png"])
def test_no_path_leaves_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded(PICTURES[0]))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DatasetError, match=r"image_folder|cannot be a path"):
        residua.capture_dataset(
            MODEL, [{"image": name}], out=tmp_path / "a.zarr", processor=processor(), image_folder=str(folder)
        )


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 9) + b"IDAT" + zlib.compress(b"0")
    with pytest.raises(DatasetError, match="pixels"):
        residua.capture_dataset(MODEL, [{"image": bomb}], out=tmp_path / "a.zarr", processor=processor())


def test_images_are_turned_upright_as_their_file_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(PICTURES[2], "PNG", exif=exif)
    made = processor()
    archive = residua.capture_dataset(
        MODEL, [{"image": turned}], out=tmp_path / "a.zarr", processor=made, sites="resid_post.0"
    ).archive
    upright = PICTURES[2].transpose(Image.Transpose.ROTATE_270)
    expected = states_of(MODEL, [upright], made)[0][1]
    torch.testing.assert_close(torch.as_tensor(archive["resid_post.0"][:]), expected)


def test_a_model_needs_its_processor_and_tokens_need_none(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="AutoImageProcessor"):
        residua.capture_dataset(MODEL, PICTURES, out=tmp_path / "a.zarr")
    with pytest.raises(PlanError, match="takes no images"):
        residua.capture_dataset(TINY["llama"](), [[1, 2]], out=tmp_path / "a.zarr", image_column="image")


def test_a_model_in_a_folder_comes_with_its_processor(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    archive = residua.capture_dataset(str(tmp_path / "model"), PICTURES, out=tmp_path / "a.zarr").archive
    assert "ViTImageProcessorPil" in str(archive.provenance["processor"])
    expected = torch.cat(states_of(MODEL, PICTURES, processor()), 1)[2]
    torch.testing.assert_close(torch.as_tensor(archive["resid_post.1"][:]), expected)
