"""Weights from stored queries and keys, tile by tile: equal to full patterns in float64, in bounded memory."""

import tracemalloc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from residua.analysis.attention.induction import induction_scores
from residua.analysis.attention.jobs import MOST_BYTES
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.format.sidecars import AttentionSpec
from tests.analysis.attention_archive import dense_weights, make_qk_archive
from tests.analysis.reference_scores import NAMES, reference_scores

SPECS = {
    "causal": AttentionSpec(scale=0.7, causal=True),
    "not-causal": AttentionSpec(scale=0.7, causal=False),
    "softcap": AttentionSpec(scale=2.0, causal=True, softcap=1.5),
    "window": AttentionSpec(scale=0.7, causal=True, window=13),
    "narrow": AttentionSpec(scale=0.7, causal=True, window=1),
    "sinks": AttentionSpec(scale=0.7, causal=True, window=30, sinks=(3.0, -50.0, 50.0, 0.0)),
}


def repeated(period: int, n_tokens: int, seed: int = 0) -> list[int]:
    block: list[int] = (
        np.random.default_rng(seed).integers(0, 7, period).tolist()
    )  # few tokens, so that many occur several times
    return (block * -(-n_tokens // period))[:n_tokens]


@pytest.mark.parametrize("most_bytes", [17_000, MOST_BYTES])  # for tiles of 8 x 8 and of 256 x 256
@pytest.mark.parametrize("name", SPECS)
def test_tiles_give_what_full_patterns_give(name: str, most_bytes: int, tmp_path: Path) -> None:
    examples = [repeated(10, n, seed) for seed, n in enumerate((11, 16, 17, 41, 70))]
    archive = make_qk_archive(tmp_path / "a.zarr", examples, SPECS[name])
    patterns = [dense_weights(archive, number, SPECS[name]) for number in range(len(examples))]
    expected = reference_scores(patterns, examples, [10] * 5, [0] * 5)
    table = induction_scores(archive, period=10, most_bytes=most_bytes)
    found = np.stack([table.column(score).to_numpy() for score in NAMES], axis=-1)
    assert np.abs(found - expected).max() < 1e-6


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the bytes of torch's tensors that exist at the same time; tracemalloc counts numpy's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self._seen:
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, n_bytes = storage.data_ptr(), storage.nbytes()
        self._seen.add(id(tensor))
        self._users[address] += 1
        if self._users[address] == 1:
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, id(tensor), address, n_bytes)

    def _drop(self, number: int, address: int, n_bytes: int) -> None:
        self._seen.discard(number)
        self._users[address] -= 1
        self.now -= 0 if self._users[address] else n_bytes


@pytest.mark.parametrize("few_tokens", [False, True])
def test_memory_keeps_to_the_budget_however_long_the_example(few_tokens: bool, tmp_path: Path) -> None:
    """A pattern of this example has 8 MiB; if all tokens are alike, every pair of a tile counts."""
    n_tokens, budget = 512, 2**19
    ids = [5] * n_tokens if few_tokens else repeated(256, n_tokens)
    archive = make_qk_archive(tmp_path / "a.zarr", [ids], SPECS["causal"], heads=(8, 2), width=16)
    with Living() as living:  # which imports much, so tracemalloc starts later
        induction_scores(archive, period=256, most_bytes=budget)
    tracemalloc.start()
    try:
        induction_scores(archive, period=256, most_bytes=budget)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    opening = 2**20  # of the archive, its examples and commits
    assert budget / 4 < living.peak < budget
    assert living.peak + peak < budget + opening


def test_a_budget_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    archive = make_qk_archive(tmp_path / "a.zarr", [repeated(10, 20)], SPECS["causal"])
    with pytest.raises(AnalysisError, match=r"1,000 bytes.* q\.0 .*more memory"):
        induction_scores(archive, period=10, most_bytes=1000)


def test_archives_that_do_not_say_how_are_refused(tmp_path: Path) -> None:
    for number, (spec, message) in enumerate(
        (
            (None, "layer 0 .*0.zarr.* does not say how.*[Cc]apture pattern sites"),
            ("its bias is by position", "q and k.* its bias is by position"),
            (AttentionSpec(scale=1.0, causal=True, sinks=(1.0,)), "2.zarr.* sinks of layer 0"),
        )
    ):
        archive = make_qk_archive(tmp_path / f"{number}.zarr", [repeated(4, 12)], spec)
        with pytest.raises(AnalysisError, match=message):
            induction_scores(archive, period=4)
    with pytest.raises(AnalysisError, match=r"empty.zarr.* no examples"):
        induction_scores(make_qk_archive(tmp_path / "empty.zarr", [], SPECS["causal"]), period=4)
    archive = make_qk_archive(tmp_path / "altered.zarr", [repeated(4, 12)], SPECS["causal"])
    stored = archive.path / "head" / "attention.json"
    stored.write_bytes(stored.read_bytes().replace(b"0.7", b"0.6"))
    with pytest.raises(DamagedArchiveError, match=r"attention\.json"):
        induction_scores(archive, period=4)
