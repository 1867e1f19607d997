"""Addresses: what they are, and which are refused."""

from pathlib import Path

import pytest

from residua.store.base.errors import StorageError
from residua.store.storage.address import HubPlace, check_address, hub_place, is_remote, joined, shown


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("acts.zarr", False),
        (Path("a/b"), False),
        ("/data/acts.zarr", False),
        ("odd:name.zarr", False),
        ("s3://bucket/acts.zarr", True),
        ("https://example.org/acts.zarr", True),
        ("hf://datasets/org/name", True),
    ],
)
def test_what_an_address_is(place: str | Path, expected: bool) -> None:
    assert is_remote(place) is expected


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s5://bucket/a", "s3://"),
        ("s3:///a", "bucket"),
        ("https://user:secret@host/a", "storage_options"),
        ("s3://bucket/a/../../b", ".."),
    ],
)
def test_other_addresses_are_refused(address: str, says: str) -> None:
    with pytest.raises(StorageError, match=says) as refused:
        check_address(address)
    assert "secret" not in str(refused.value)


def test_the_parts_of_a_hub_address() -> None:
    assert hub_place("hf://datasets/org/name") == HubPlace("org/name", "main", "")
    assert hub_place("hf://datasets/org/name@v1.0/a/b.zarr") == HubPlace("org/name", "v1.0", "a/b.zarr")
    assert hub_place("hf://buckets/org/name/b.zarr") == HubPlace("org/name", "", "b.zarr", "buckets")
    with pytest.raises(StorageError, match="hf://datasets/ORG/NAME"):
        hub_place("hf://org/name")


def test_messages_hold_no_secrets() -> None:
    assert shown("https://user:secret@host/a?signature=secret") == "https://host/a"
    assert joined("s3://b/a.zarr", "zarr.json") == "s3://b/a.zarr/zarr.json"
    assert joined(Path("a.zarr"), "zarr.json") == "a.zarr/zarr.json"
