"""Readers in threads and child processes, and the files that all readers of a process keep open."""

import gc
import multiprocessing
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.store.base.errors import DamagedArchiveError
from residua.store.encoding.shard import shard_path
from residua.store.read.mapped import OPEN_SHARDS, OpenShards
from residua.store.read.rows_in_shards import ArrayReader
from tests.store.samples import N_ROWS, Array, Stored, make_spec, same_bits, store


def test_chunks_stay_verified_when_their_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path, make_spec("raw"))
    compared: list[Array] = []
    monkeypatch.setattr("residua.store.read.mapped.check_chunk", compared.append)
    reader = kept.reader(open_shards=OpenShards(1))
    for _ in range(3):
        assert same_bits(reader.read(0, N_ROWS), kept.rows)
        assert same_bits(reader.take([50, 0]), kept.rows[[50, 0]])
    assert len(compared) == -(-N_ROWS // kept.spec.rows_per_chunk)


def test_all_readers_share_their_threads(tmp_path: Path) -> None:
    kept = store(tmp_path, make_spec("fast"))
    readers = [kept.reader(threads=4) for _ in range(40)]
    for reader in readers:
        reader.read(0, N_ROWS)
    assert sum("residua-reader" in thread.name for thread in threading.enumerate()) <= max(4, os.cpu_count() or 1)


def test_reader_pickles_as_its_path(stored: Stored) -> None:
    reader = stored.reader(check="always", threads=2)
    reader.read(0, N_ROWS)
    text = pickle.dumps(reader)
    assert len(text) < 2000
    assert same_bits(pickle.loads(text).read(0, N_ROWS), stored.rows)  # noqa: S301  # just made above


def _read_in_child(reader: ArrayReader, expected: Array, answers: "multiprocessing.Queue[bool]") -> None:
    answers.put(same_bits(reader.read(0, N_ROWS), expected) and same_bits(reader.take([50, 0]), expected[[50, 0]]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_reader_works_in_a_child_process(stored: Stored, method: str) -> None:
    reader = stored.reader(threads=3)
    reader.read(0, N_ROWS)
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, stored.rows, answers))
    child.start()
    assert answers.get(timeout=300)
    child.join()
    assert same_bits(reader.read(0, N_ROWS), stored.rows)


def test_many_threads_share_a_reader(stored: Stored) -> None:
    reader = stored.reader(threads=2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            rows = rng.integers(0, N_ROWS, 40)
            start = int(rng.integers(0, N_ROWS))
            if not (
                same_bits(reader.take(rows), stored.rows[rows])
                and same_bits(reader.read(start, N_ROWS), stored.rows[start:])
            ):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_error_in_a_thread_reaches_the_caller(fresh: Stored) -> None:
    fresh.shards[-1].unlink()
    with pytest.raises(DamagedArchiveError, match="c/3/0/0 is missing"):
        fresh.reader(threads=4).read(0, N_ROWS)


def test_the_files_of_a_reader_are_closed_with_it(fresh: Stored) -> None:
    gc.collect()  # so that no reader of another test goes in between
    before = len(OPEN_SHARDS)
    reader = fresh.reader()
    reader.read(0, N_ROWS)
    assert len(OPEN_SHARDS) == before + 4
    del reader
    assert len(OPEN_SHARDS) == before


def test_the_shard_unused_for_longest_is_closed_first(stored: Stored) -> None:
    kept = OpenShards(2)
    first, second, third = stored.mapped(3)
    owner = object()
    assert kept.get((owner, 0), lambda: first) is first
    assert kept.get((owner, 1), lambda: second) is second
    assert kept.get((owner, 0), lambda: third) is first
    kept.get((owner, 2), lambda: third)
    assert len(kept) == 2
    assert kept.get((owner, 0), lambda: second) is first
    assert kept.get((owner, 1), lambda: third) is third
    kept.drop(object())
    assert len(kept) == 2
    kept.drop(owner)
    assert len(kept) == 0


def test_mapped_bytes_can_be_limited(stored: Stored) -> None:
    kept = OpenShards(10)
    shards = list(stored.mapped(3))
    kept.limit(shards[0].n_bytes + shards[1].n_bytes)
    owner = object()
    for i in range(3):
        kept.get((owner, i), iter(shards[i:]).__next__)
    assert len(kept) == 2
    assert kept.get((owner, 2), lambda: shards[0]) is shards[2]
    kept.limit(0)
    kept.get((owner, 3), lambda: shards[0])
    assert len(kept) == 1


@pytest.mark.parametrize("preset", ["raw", "fast"])
def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_no_crash(preset: str, tmp_path: Path) -> None:
    kept = store(tmp_path, make_spec(preset))
    reader = kept.reader()
    assert same_bits(reader.read(0, N_ROWS), kept.rows)
    path = shard_path(tmp_path, kept.spec, 1)
    os.truncate(path, 10)
    first = kept.spec.rows_per_shard
    for rows in ([*range(N_ROWS)], [first + 1, 0], [first]):
        with pytest.raises(DamagedArchiveError, match=f"{path} was cut short to 10 of .*restore"):
            reader.take(rows)
    with pytest.raises(DamagedArchiveError, match="cut short"):
        reader.read(0, N_ROWS)
    assert same_bits(reader.read(0, first), kept.rows[:first])


@contextmanager
def few_descriptors(n: int) -> Iterator[None]:
    """Leave this process `n` descriptors that it may still open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 100, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(n):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("preset", ["raw", "fast"])
def test_a_process_without_descriptors_closes_shards_first(preset: str, tmp_path: Path) -> None:
    kept = store(tmp_path, make_spec(preset))
    open_shards = OpenShards(1000)
    reader = kept.reader(open_shards=open_shards, threads=1)
    gc.collect()
    with few_descriptors(3):
        assert same_bits(reader.read(0, N_ROWS), kept.rows)
        assert len(open_shards) < len(kept.shards), "all shards fit: the test shows nothing"
        assert same_bits(reader.take([50, 0]), kept.rows[[50, 0]])
    with few_descriptors(0), pytest.raises(OSError, match="ulimit -n"):
        kept.reader(open_shards=OpenShards(1000)).read(0, N_ROWS)
