"""The cache on the local disk."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from residua.store.storage.disk_cache import DiskCache


def test_what_is_put_is_found_by_others_until_it_is_dropped(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "made")
    assert cache.get("a") is None
    cache.put("a", b"content")
    assert DiskCache(tmp_path / "made").get("a") == b"content"
    cache.drop("a")
    assert cache.get("a") is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=10_000)
    for i in range(10):
        cache.put(str(i), bytes(1000))
        os.utime(cache._path(str(i)), (i, i))
    assert cache.get("0") is not None, "used now"
    cache.put("new", bytes(1000))
    assert cache.n_bytes() <= 10_000
    assert (cache.get("0"), cache.get("new")) == (bytes(1000), bytes(1000))
    assert cache.get("1") is None


def fill(folder: Path) -> int:
    cache = DiskCache(folder, max_bytes=50_000)
    for i in range(200):
        cache.put(f"{i % 40}", bytes([i % 40]) * 2000)
        found = cache.get(f"{i % 7}")
        assert found is None or found == bytes([i % 7]) * 2000
    return cache.n_bytes()


def test_processes_fill_it_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        sizes = list(pool.map(fill, [tmp_path] * 3))
    assert max(sizes) <= 60_000
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file")
    cache.put("a", b"content")
    assert cache.get("a") is None
