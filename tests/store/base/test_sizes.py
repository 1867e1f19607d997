"""Sizes as texts: units of 1000 and of 1024, and what is no size."""

from typing import Any

import pytest

from residua.store.base.errors import PlanError
from residua.store.base.naming import naming_flags
from residua.store.base.sizes import n_bytes
from residua.store.storage.disk_cache import DiskCache


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("4GiB", 4 * 2**30),
        ("4Gi", 4 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("512kB", 512_000),
        ("7", 7),
        ("7B", 7),
        ("1TB", 10**12),
        (123, 123),
    ],
)
def test_a_size_in_bytes(text: Any, expected: int) -> None:
    assert n_bytes(text, "host_memory") == expected
    assert DiskCache("unused", text).max_bytes == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e9", "4 XB", "4GBB", "0", 0, -1, True, 1.5, None, "0.1B", "9" * 40]
)
def test_what_is_no_size_is_refused_with_an_example(text: Any) -> None:
    with naming_flags(), pytest.raises(PlanError, match=r"--host-memory.*4GiB"):
        n_bytes(text, "host_memory")
