"""Sidecar files: `attention.json` comes back as it was written, and other texts are refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import UnsafeArchiveError
from residua.store.format.sidecars import AttentionSpec, attention_from_json, attention_to_json

LAYERS: dict[int, AttentionSpec | str] = {
    0: AttentionSpec(scale=0.25, causal=True, softcap=50.0, window=8, sinks=(0.5, -1.0)),
    2: "a bias by position",
    11: AttentionSpec(scale=1.0, causal=False),
}


def test_attention_comes_back_as_it_was() -> None:
    assert attention_from_json(attention_to_json(LAYERS)) == LAYERS


@pytest.mark.parametrize(
    "change",
    [
        {"scale": "1"},
        {"scale": float("nan")},
        {"scale": True},
        {"causal": 1},
        {"causal": False},  # with a window
        {"softcap": 0},
        {"window": 0},
        {"window": 2.0},
        {"sinks": [None]},
        {"sinks": "12"},
        {"other": 1},
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    entries = json.loads(attention_to_json(LAYERS))
    entries["0"] |= change
    with pytest.raises(UnsafeArchiveError, match="copy the archive again"):
        attention_from_json(json.dumps(entries).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b'{"x": "why"}', b'{"-1": "why"}', b'{"0": 3}', b"[" * 99999])
def test_other_json_than_an_object_of_layers_is_refused(text: bytes) -> None:
    with pytest.raises(UnsafeArchiveError):
        attention_from_json(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    try:
        attention_from_json(text)
    except UnsafeArchiveError:
        return
    assert isinstance(json.loads(text), dict)
