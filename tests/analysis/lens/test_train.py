"""Training: continued after a kill, the same lens from any number of workers, bounded memory for a large vocabulary."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.lens.ridge import fit_bytes
from residua.analysis.lens.rows import CHUNK_ROWS, LensRows
from residua.analysis.lens.train import LensTraining
from residua.analysis.support.cluster import Cluster, connect
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.lens_archive import make_lens_archive

torch.set_num_threads(1)
EPOCHS = 20


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert process.poll() is None, "it ended before the kill"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_training_continues_from_its_finished_layers(tmp_path: Path) -> None:
    archive = make_lens_archive(tmp_path / "a.zarr")
    unbroken = TunedLens.fit(archive, out=tmp_path / "unbroken", epochs=EPOCHS)
    words = ["lens", "train", str(archive.path), "--out", str(tmp_path / "lens"), "--scheduler", "inline"]
    words += ["--epochs", str(EPOCHS), "--together", "1"]
    process = subprocess.Popen([sys.executable, "-m", "residua", *words], stderr=subprocess.DEVNULL)
    work = tmp_path / "lens" / "work"
    wait_for(work / "layer-1.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "layer-2.safetensors").exists()
    finished = (work / "layer-1.safetensors").stat()
    with pytest.raises(AnalysisError, match=f"{tmp_path / 'lens'} .*epochs.*out="):
        TunedLens.fit(archive, out=tmp_path / "lens", epochs=EPOCHS + 1, together=1)
    with connect("inline") as cluster:
        settings = LensSettings(epochs=EPOCHS, together=1)
        training = LensTraining(Archive(archive.path), tmp_path / "lens", settings=settings, cluster=cluster)
        training.train()
        assert (work / "layer-1.safetensors").stat() == finished
        continued = TunedLens(*training.evaluate())
    for layer, translator in unbroken.translators.items():
        assert torch.equal(translator.weight, continued.translators[layer].weight)
    TunedLens.fit(archive, out=tmp_path / "lens", settings=settings)
    assert not work.exists()
    assert (tmp_path / "lens" / "params.pt").read_bytes() == (tmp_path / "unbroken" / "params.pt").read_bytes()


def test_a_folder_from_a_run_killed_at_its_start_counts_as_empty(tmp_path: Path) -> None:
    """It holds only the temporary file of a dead process, as `write_file` names it."""
    archive, out = make_lens_archive(tmp_path / "a.zarr"), tmp_path / "lens"
    gone = subprocess.Popen(["true"])
    gone.wait()
    (out / "work").mkdir(parents=True)
    (out / "work" / f".run.json.{gone.pid}-0123abcd.tmp").write_bytes(b"{")
    TunedLens.fit(archive, out=out, refine=False)
    assert not (out / "work").exists()
    for foreign in ("notes.txt", "work/notes.txt"):
        other = tmp_path / foreign.replace("/", "-")
        (other / "work").mkdir(parents=True)
        (other / foreign).write_text("mine")
        with pytest.raises(AnalysisError, match=f"{other} is not empty"):
            TunedLens.fit(archive, out=other, refine=False)
        assert (other / foreign).read_text() == "mine"


def test_a_kill_while_the_work_is_cleared_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the kill comes after, the same command gives the same lens."""
    archive, out = make_lens_archive(tmp_path / "a.zarr"), tmp_path / "lens"
    TunedLens.fit(archive, out=tmp_path / "unbroken", refine=False)
    n_removed, remove = 0, Path.unlink

    def stop_after_one(path: Path, missing_ok: bool = False) -> None:
        nonlocal n_removed
        if path.parent == out / "work" and not path.name.startswith("."):
            n_removed += 1
            if n_removed == 2:
                raise KeyboardInterrupt
        remove(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        TunedLens.fit(archive, out=out, refine=False)
    monkeypatch.undo()
    assert (out / "params.pt").is_file()
    assert (out / "work" / "run.json").is_file()
    TunedLens.fit(archive, out=out, refine=False)
    assert not (out / "work").exists()
    assert (out / "params.pt").read_bytes() == (tmp_path / "unbroken" / "params.pt").read_bytes()


def fit_on(
    cluster: Cluster,
    archive: Archive,
    out: Path,
    *,
    rows_per_part: int = 100_000,
    sums_share: int = 16,
    chunk_rows: int = CHUNK_ROWS,
    **options: Any,
) -> bytes:
    training = LensTraining(
        archive,
        out,
        settings=LensSettings(**options),
        cluster=cluster,
        rows_per_part=rows_per_part,
        sums_share=sums_share,
        chunk_rows=chunk_rows,
    )
    training.train()
    TunedLens(*training.evaluate()).save(out)
    training.clear()
    return (out / "params.pt").read_bytes()


class Resized:
    """This process, presented as a cluster of another size."""

    def __init__(self, inline: Cluster, n_workers: int, memory_limit: int) -> None:
        self.n_workers, self.memory_limit = n_workers, memory_limit
        self.map, self.sum, self.send = inline.map, inline.sum, inline.send
        self.bar, self.let_go = inline.bar, inline.let_go


def test_little_memory_divides_layers_and_spare_workers_divide_rows(lens_archive: Archive, tmp_path: Path) -> None:
    """About 2,000 rows train. 20 workers for 2 layers would make ten parts, if there were enough rows."""
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone")
        assert fit_on(Resized(inline, 1, 2**20), lens_archive, tmp_path / "little") == alone
        assert fit_on(Resized(inline, 3, 2**32), lens_archive, tmp_path / "three") == alone
        assert fit_on(Resized(inline, 20, 2**32), lens_archive, tmp_path / "few rows") == alone
        split = fit_on(inline, lens_archive, tmp_path / "split", parts=2)
        four, twenty = Resized(inline, 4, 2**32), Resized(inline, 20, 2**32)
        assert fit_on(four, lens_archive, tmp_path / "four", rows_per_part=800) == split
        assert fit_on(twenty, lens_archive, tmp_path / "twenty", rows_per_part=800) == split
        assert fit_on(twenty, lens_archive, tmp_path / "one part", rows_per_part=800, parts=1) == alone


def kill_a_worker(moment: Path) -> None:
    """Kill a worker once `moment` exists; the layers are being fitted then."""
    deadline = time.monotonic() + 120
    while not moment.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    next(child for child in multiprocessing.active_children() if "Dask Worker" in child.name).kill()  # no loader's


def test_every_number_of_workers_gives_the_same_lens(lens_archive: Archive, scheduler: str, tmp_path: Path) -> None:
    """Bit for bit, whichever layers go together, also if a worker dies. Divided rows give another lens."""
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone", epochs=2)
        assert fit_on(inline, lens_archive, tmp_path / "apart", epochs=2, together=1) == alone
        split = fit_on(inline, lens_archive, tmp_path / "split", epochs=2, parts=2)
    with connect(scheduler) as two:
        assert two.n_workers == 2
        assert fit_on(two, lens_archive, tmp_path / "two", epochs=2) == alone
        killer = Thread(target=kill_a_worker, args=(tmp_path / "parts" / "work" / "sums-2.safetensors",))
        killer.start()
        assert fit_on(two, lens_archive, tmp_path / "parts", epochs=2, parts=2) == split
        killer.join()
    assert split != alone
    scores = [TunedLens.load(tmp_path / name).report for name in ("alone", "split")]
    one, other = (score["kl"].to_numpy().mean() for score in scores if score is not None)
    assert abs(one - other) < 0.1 * one


LARGE = """
import json, resource, sys
import torch
from residua.analysis.lens.lm_head import LMHead
from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.evaluate import evaluate
from residua.analysis.lens.unembedding import Decoder
from residua.store.format.sidecars import LMHeadSpec

torch.set_num_threads(1)
V, D, N = 131_072, 64, 256
class Reader:
    def read(self, site, rows):
        return torch.randn(len(rows), D, generator=torch.Generator().manual_seed(len(site)))
    def next_tokens(self, rows):
        return rows
weight = torch.randn(V, D, dtype=torch.bfloat16)
decoder = Decoder(LMHead(LMHeadSpec(norm="rms", dtype="bfloat16"), {"unembed.weight": weight}), most_bytes=V * D)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import numpy as np
maps = {"resid_post.0": {"ridge": Translator.identity(D)}}
scores = evaluate(maps, "final", np.arange(N), Reader(), decoder)
target = decoder.logits(torch.randn(128, D)).softmax(-1)
decoder.kl_gradient(torch.randn(128, D), target)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"added": (after - before) * 1024, "rows": scores["resid_post.0"]["ridge"].n_rows}))
"""


def test_a_large_vocabulary_takes_bounded_memory() -> None:
    """131,072 tokens: logits of all 256 rows at once would take 134 MB, and five such arrays exist at a time."""
    shown = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=200)
    found = json.loads(shown.stdout)
    assert found["rows"] == 256
    assert found["added"] < 400 * 2**20


def test_blocks_of_columns_of_the_sums_give_the_same_lens(lens_archive: Archive, tmp_path: Path) -> None:
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone", refine=False)
        (width,) = lens_archive.plan.site("resid_post.0").row_shape
        sums_share = inline.memory_limit // (2 * 8 * width * (width // 3))
        divided = fit_on(inline, lens_archive, tmp_path / "divided", refine=False, sums_share=sums_share)
    assert len(divided) == len(alone)
    found, expected = (TunedLens.load(tmp_path / name) for name in ("divided", "alone"))
    rows = lens_archive["resid_post.0"].torch(range(40)).float()
    torch.testing.assert_close(found.apply("resid_post.0", rows), expected.apply("resid_post.0", rows))


def test_too_few_rows_and_too_little_memory_are_refused_before_anything_runs(
    lens_archive: Archive, tmp_path: Path
) -> None:
    with connect("inline") as inline:
        with pytest.raises(AnalysisError, match=r"width \d+ .*GiB.*memory_limit="):
            fit_on(Resized(inline, 1, 4096), lens_archive, tmp_path / "memory")
        with pytest.raises(AnalysisError, match=r"14 rows.*too few for width \d+.*rows="):
            fit_on(inline, lens_archive, tmp_path / "rows", rows=10, chunk_rows=16)
        (width,) = lens_archive.plan.site("resid_post.0").row_shape
        held = len(LensRows(lens_archive, LensSettings()).held_out_rows(4096))
        head_bytes = (lens_archive.head / "head.safetensors").stat().st_size
        without_head = Resized(inline, 1, int((fit_bytes(width, held) + head_bytes / 2) * 4 / 3))
        with pytest.raises(AnalysisError, match=r"LM head.*memory_limit="):
            fit_on(without_head, lens_archive, tmp_path / "head", refine=False)
    assert not list(tmp_path.iterdir())


def test_all_layers_that_fit_are_summed_in_one_read(
    lens_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = Counter[str](), LensRows.read

    def counted(self: LensRows, site: str, rows: Any) -> torch.Tensor:
        reads[site] += len(rows)
        return read(self, site, rows)

    with connect("inline") as inline:
        training = LensTraining(
            lens_archive, tmp_path / "a", settings=LensSettings(refine=False), cluster=inline, origin_chunks=0
        )
        reader = LensRows(lens_archive, LensSettings())
        monkeypatch.setattr(LensRows, "read", counted)
        training._sum([1, 2])
    n_rows = len(reader.training_rows(reader.chunks()))
    assert reads == dict.fromkeys(("resid_post.0", "resid_post.1", "resid_post.2"), n_rows)


def test_large_vocabularies_have_candidates_unless_all_tokens_are_asked_for() -> None:
    of_tokens = {n: LensSettings().n_candidates(n) for n in (1_024, 32_000, 65_536, 131_072)}
    assert of_tokens == {1_024: 0, 32_000: 0, 65_536: 8_192, 131_072: 8_192}
    assert LensSettings(candidates=0).n_candidates(131_072) == 0
    assert LensSettings(candidates=16).n_candidates(97) == 16
    assert LensSettings(candidates=16).n_candidates(32) == 0
    with pytest.raises(AnalysisError, match=r"candidates=-1"):
        LensSettings(candidates=-1)


def test_a_device_is_looked_for_before_anything_runs(lens_archive: Archive, tmp_path: Path) -> None:
    with connect("inline") as inline:
        alone = fit_on(inline, lens_archive, tmp_path / "alone")
        assert fit_on(inline, lens_archive, tmp_path / "cpu", device="cpu") == alone
        n_devices = torch.cuda.device_count()
        for device in ("abacus", f"cuda:{n_devices}"):
            with pytest.raises(AnalysisError, match=f"device='{device}'"):
                fit_on(inline, lens_archive, tmp_path / "none", device=device)
    assert not (tmp_path / "none").exists()
