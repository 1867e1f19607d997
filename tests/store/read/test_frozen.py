"""Archives of released versions of the format stay readable, with the same values."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import residua
from tests.plain_zarr import plain_array

FIXTURES = Path(__file__).parents[2] / "fixtures"
ARCHIVES = sorted(FIXTURES.glob("format-*/*.archive"))


def frozen_digests(path: Path) -> dict[str, str]:
    digests: dict[str, dict[str, str]] = json.loads((path.parent / "digests.json").read_text())
    return digests[path.stem]


def test_every_preset_is_frozen() -> None:
    assert {path.stem for path in ARCHIVES} >= {"raw", "fast", "small", "bitround10", "int8-block32"}


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_frozen_archives_are_sound_and_unchanged(path: Path) -> None:
    assert residua.verify(path).problems == []
    archive = residua.open(path)
    assert archive.is_sealed
    digests = frozen_digests(path)
    for node, digest in digests.items():
        assert hashlib.sha256(plain_array(path, node).tobytes()).hexdigest() == digest
    for site in archive.plan.sites:
        if site.codec != "int8-block32":
            found = np.ascontiguousarray(archive[site.name].bits())
            assert hashlib.sha256(found.tobytes()).hexdigest() == digests[site.path]
    assert archive.rows.example[...].tolist() == [0] * 5 + [1] * 17 + [2] + [3] * 9 + [4] * 30
    assert archive.examples.column("label").to_pylist() == ["5", "17", "1", "9", "30"]


def test_frozen_int8_is_code_times_scale() -> None:
    """The format page's rule, by hand, in float32 rounded to bfloat16."""
    path = FIXTURES / "format-1.0" / "int8-block32.archive"
    codes, scales = (plain_array(path, f"{folder}/resid_post/1") for folder in ("sites", "scales"))
    values = codes.astype(np.float32) * np.repeat(scales, 32, axis=-1)[:, : codes.shape[1]]
    assert np.array_equal(residua.open(path)["resid_post.1"][...], values.astype(ml_dtypes.bfloat16))
