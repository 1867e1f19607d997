"""What cannot fit on a disk is refused, and what may not fit is noted."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from residua.store.format.plan import SitePlan
from residua.store.format.room import check_room

GIB = 2**30
Usage = namedtuple("Usage", "total used free")
ROWS = 2**20
WIDTH = 512  # in bfloat16 1 GiB of rows


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of every disk, in a list that a test changes."""
    found = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**50, 0, found[0]))
    return found


def site(name: str, codec: str = "fast", dtype: str = "bfloat16") -> SitePlan:
    return SitePlan(name=name, row_shape=(WIDTH,), dtype=dtype, codec=codec)


@pytest.mark.parametrize(
    ("one", "refused_below", "noted_below"),
    [
        (site("resid_post.3"), 1 / 4, 1),
        (site("logits", "small"), 1 / 4, 1),
        (site("q.0", "raw"), 1, 1),
        (site("module:lm_head", "raw", "float32"), 2, 2),
        (site("pattern.0"), 0, 1),
        (site("mlp_act.0", dtype="float32"), 0, 2),
        (site("module:lm_head"), 0, 1),
        (site("resid_mid.0", "int8-block32"), (1 / 2 + 1 / 16) / 4, 1 / 2 + 1 / 16),
        (site("resid_mid.0", "bitround7", "float32"), 2 / 4, 2),
    ],
    ids=str,
)
def test_sizes_by_codec_and_kind(
    one: SitePlan, refused_below: float, noted_below: float, free: list[int], tmp_path: Path
) -> None:
    place, columns = tmp_path / "a.zarr", 16 * ROWS
    free[0] = int(noted_below * GIB) + columns
    assert check_room(place, [one], ROWS) == []
    free[0] -= columns + 1
    if noted_below > refused_below:
        [note] = check_room(place, [one], ROWS)
        assert str(place) in note
        assert "GiB" in note
    if refused_below:
        free[0] = int(refused_below * GIB) - 1
        with pytest.raises(OSError, match=rf"{place}.*GiB of free space.*{ROWS:,} rows") as caught:
            check_room(place, [one], ROWS)
        assert caught.value.errno == 28
    else:
        free[0] = 0
        assert len(check_room(place, [one], ROWS)) == 1


def test_nothing_more_fits_on_a_full_disk(free: list[int], tmp_path: Path) -> None:
    assert check_room(tmp_path / "a.zarr", [site("q.0", "raw")], 0) == []
    assert free == [0]
