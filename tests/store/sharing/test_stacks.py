"""Archives of several stacks, copied as one to a bucket and back."""

from pathlib import Path

import numpy as np
import pytest

import residua
from residua.store.base.errors import PlanError
from residua.store.format.stacks import create_stacks
from residua.store.sharing.pull import pull
from residua.store.sharing.push import push
from tests.servers.clouds import serving_cloud
from tests.store.small_archive import make_archive


def stacked(path: Path, seed: int = 0) -> Path:
    create_stacks(path, ("encoder", "decoder"))
    make_archive(path / "encoder", stack="encoder", seed=seed)
    make_archive(path / "decoder", stack="decoder", seed=seed + 1)
    return path


def test_there_and_back(tmp_path: Path) -> None:
    source, steps = stacked(tmp_path / "m.zarr"), list[tuple[int, int]]()
    with serving_cloud("gs") as cloud:
        address, options = cloud.address("m.zarr"), {"storage_options": cloud.options}
        copied = push(source, address, on_bytes=lambda *step: steps.append(step), **options)  # type: ignore[arg-type]
        assert steps[-1][0] == steps[-1][1]
        assert push(source, address, storage_options=cloud.options).sent_bytes < copied.sent_bytes
        assert residua.verify(address, storage_options=cloud.options).is_sound
        pull(address, tmp_path / "back.zarr", storage_options=cloud.options)
        pull(address, tmp_path / "some.zarr", sites="decoder.q.1", storage_options=cloud.options)
        with pytest.raises(PlanError, match="several stacks"):
            push(make_archive(tmp_path / "other.zarr"), address, storage_options=cloud.options)
    here, back, some = (residua.open(tmp_path / name) for name in ("m.zarr", "back.zarr", "some.zarr"))
    assert back.sites == here.sites
    for site in here.sites:
        assert np.array_equal(back[site][:], here[site][:])
    assert residua.verify(tmp_path / "back.zarr").is_sound
    assert np.array_equal(some["decoder.q.1"][:], here["decoder.q.1"][:])


def test_on_the_hub_each_goes_by_itself(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"one by one.*m\.zarr/encoder"):
        push(stacked(tmp_path / "m.zarr"), "hf://datasets/org/acts")
