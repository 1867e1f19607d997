"""Columns that say which rows are patches of images, in loaders and probes, compared with zarr's reading of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import residua
from residua.analysis.loader.loader import Loader
from residua.analysis.probes.target import read_target
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.models.tiny_multimodal import MULTIMODAL

SITE = "resid_post.1"
COLUMNS = ("modality", "image", "view", "patch_row", "patch_column")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Chats with an image each, and one without."""
    model, processor = MULTIMODAL["llava"]()
    words = ["what is in this picture", "a small red cat", "and that one", "the original picture"]
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            "images": [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 40, 3), dtype=np.uint8))],
        }
        for n, text in enumerate([*words, *reversed(words)])
    ]
    rows.append({"messages": [{"role": "user", "content": [{"type": "text", "text": "what is in"}]}], "images": []})
    path = tmp_path_factory.mktemp("images") / "a.zarr"
    return residua.capture_dataset(
        model, rows, out=path, processor=processor, image_column="images", sites=SITE
    ).archive


def stored(archive: Archive, name: str) -> Any:
    group: Any = zarr.open_group(str(archive.path), mode="r")
    return group[f"rows/{name}"][:]


def test_batches_leave_out_patches_and_say_what_rows_are(archive: Archive) -> None:
    modality, values = stored(archive, "modality"), archive[SITE][:]
    for word, number in (("text", 0), ("image", 1), ("special", 2)):
        where, rows = f"modality == '{word}'", list[int]()
        for batch in Loader(archive, SITE, batch_size=7, where=where, columns=COLUMNS):
            chosen = np.asarray(batch["row"])
            rows += chosen.tolist()
            np.testing.assert_array_equal(batch[SITE], values[chosen])
            for name in COLUMNS:
                np.testing.assert_array_equal(batch[name], stored(archive, name)[chosen], err_msg=name)
        assert sorted(rows) == np.flatnonzero(modality == number).tolist()


def test_probes_predict_what_rows_are(archive: Archive) -> None:
    modality, place = stored(archive, "modality"), stored(archive, "patch_row")
    every = np.arange(len(modality))
    target = read_target(archive, "modality")
    assert target.names == ("text", "image", "special")
    np.testing.assert_array_equal(target.values(every), modality)
    found = read_target(archive, "patch_row").values(every)
    np.testing.assert_array_equal(np.isnan(found), modality != 1)
    np.testing.assert_array_equal(found[modality == 1], place[modality == 1])
    probes = residua.probe(archive, "modality", SITE, seed=1)
    assert SITE in str(probes.to_pylist() if hasattr(probes, "to_pylist") else probes)
    residua.probe(archive, "patch_row", SITE, where="modality == 'image'", seed=1)
    with pytest.raises(AnalysisError, match=r"patch_row >= 0"):
        residua.probe(archive, "patch_row", SITE)


def test_an_archive_of_text_has_no_such_columns(tmp_path: Path) -> None:
    model, _ = MULTIMODAL["llava"]()
    text = residua.capture_dataset(model, [[1, 40, 41], [1, 35]], out=tmp_path / "a.zarr", sites=SITE).archive
    with pytest.raises(AnalysisError, match=r"modality.*token, position, example"):
        Loader(text, SITE, batch_size=2, columns=["modality"])
    with pytest.raises(AnalysisError, match="modality"):
        residua.probe(text, "modality", SITE)
    assert torch.isfinite(torch.as_tensor(text[SITE][:])).all()
