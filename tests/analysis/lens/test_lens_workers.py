"""A lens is the same from any number of workers, whatever memory they have, and though one dies."""

import multiprocessing
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from residua.analysis.lens import train as lens_train
from residua.analysis.lens.lens import TunedLens
from residua.analysis.support.cluster import Cluster, connect
from residua.store.read.archive import Archive

torch.set_num_threads(1)


def fit_on(cluster: Cluster, archive: Archive, out: Path, **settings: Any) -> bytes:
    TunedLens.fit(archive, out=out, cluster=cluster, **settings)
    return (out / "params.pt").read_bytes()


class Pretended:
    """This process, as a cluster of another size."""

    def __init__(self, inline: Cluster, n_workers: int, memory_limit: int) -> None:
        self.n_workers, self.memory_limit, self.map = n_workers, memory_limit, inline.map


def test_little_memory_parts_layers_and_spare_workers_split_rows(
    lens_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 2,000 rows train; 20 workers for 2 layers would make ten parts of them, were there rows enough."""
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone")
        assert fit_on(Pretended(inline, 1, 2**20), lens_archive, tmp_path / "little") == alone
        assert fit_on(Pretended(inline, 3, 2**32), lens_archive, tmp_path / "three") == alone
        assert fit_on(Pretended(inline, 20, 2**32), lens_archive, tmp_path / "few rows") == alone
        split = fit_on(inline, lens_archive, tmp_path / "split", parts=2)
        monkeypatch.setattr(lens_train, "_PART_ROWS", 800)
        assert fit_on(Pretended(inline, 4, 2**32), lens_archive, tmp_path / "four") == split
        assert fit_on(Pretended(inline, 20, 2**32), lens_archive, tmp_path / "twenty") == split
        assert fit_on(Pretended(inline, 20, 2**32), lens_archive, tmp_path / "told", parts=1) == alone


def kill_a_worker(moment: Path) -> None:
    """Kill a worker once a file is there: the layers are being fitted then."""
    deadline = time.monotonic() + 120
    while not moment.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    victim, *_ = multiprocessing.active_children()
    victim.kill()


def test_every_number_of_workers_gives_the_same_lens(lens_archive: Archive, tmp_path: Path) -> None:
    """To the bit, whichever layers go together, and though a worker dies; where rows are split, it is another."""
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone", epochs=2)
        assert fit_on(inline, lens_archive, tmp_path / "apart", epochs=2, together=1) == alone
        split = fit_on(inline, lens_archive, tmp_path / "split", epochs=2, parts=2)
    with connect(workers=2, memory_limit="2GiB") as two:
        assert fit_on(two, lens_archive, tmp_path / "two", epochs=2) == alone
        killer = Thread(target=kill_a_worker, args=(tmp_path / "parts" / "work" / "sums-2.safetensors",))
        killer.start()
        assert fit_on(two, lens_archive, tmp_path / "parts", epochs=2, parts=2) == split
        killer.join()
    assert split != alone
    scores = [TunedLens.load(tmp_path / name).report for name in ("alone", "split")]
    one, other = (score["kl"].to_numpy().mean() for score in scores if score is not None)
    assert abs(one - other) < 0.1 * one
