"""A training that is killed goes on from its finished layers; a large vocabulary stays within the worker's memory."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.settings import LensSettings
from residua.analysis.lens.train import LensTraining
from residua.analysis.support.cluster import connect
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.lens_archive import make_lens_archive

EPOCHS = 40


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_training_goes_on_from_its_finished_layers(tmp_path: Path) -> None:
    archive = make_lens_archive(tmp_path / "a.zarr")
    whole = TunedLens.fit(archive, out=tmp_path / "whole", epochs=EPOCHS)
    words = ["lens", "train", str(archive.path), "--out", str(tmp_path / "lens"), "--scheduler", "inline"]
    words += ["--epochs", str(EPOCHS), "--together", "1"]
    process = subprocess.Popen([sys.executable, "-m", "residua", *words], stderr=subprocess.DEVNULL)
    work = tmp_path / "lens" / "work"
    wait_for(work / "layer-1.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "layer-2.safetensors").exists()
    finished = (work / "layer-1.safetensors").stat()
    with pytest.raises(AnalysisError, match="unfinished lens with another epochs"):
        TunedLens.fit(archive, out=tmp_path / "lens", epochs=EPOCHS + 1, together=1)
    with connect("inline") as cluster:
        settings = LensSettings(epochs=EPOCHS, together=1)
        training = LensTraining(Archive(archive.path), tmp_path / "lens", settings=settings, cluster=cluster)
        training.train()
        assert (work / "layer-1.safetensors").stat() == finished
        parts = training.judge()
    for depth, translator in whole.translators.items():
        assert torch.equal(translator.weight, parts.translators[depth].weight)
    TunedLens.fit(archive, out=tmp_path / "lens", settings=settings)
    assert not work.exists()
    assert (tmp_path / "lens" / "params.pt").read_bytes() == (tmp_path / "whole" / "params.pt").read_bytes()


def test_what_a_kill_leaves_before_there_is_anything_is_as_good_as_empty(tmp_path: Path) -> None:
    """The temporary of a process that is gone, as `write_file` names it, and no more."""
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
        with pytest.raises(AnalysisError, match="is not empty"):
            TunedLens.fit(archive, out=other, refine=False)
        assert (other / foreign).read_text() == "mine"


def test_a_kill_while_the_work_is_cleared_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the kill comes after, the same command gives the same lens."""
    archive, out = make_lens_archive(tmp_path / "a.zarr"), tmp_path / "lens"
    TunedLens.fit(archive, out=tmp_path / "whole", refine=False)
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
    assert (out / "params.pt").read_bytes() == (tmp_path / "whole" / "params.pt").read_bytes()


LARGE = """
import json, resource, sys
import torch
from residua.analysis.lens.lm_head import Head
from residua.analysis.lens.decoder import Decoder
from residua.analysis.lens.evaluate import judge
from residua.analysis.lens.translator import Translator
from residua.store.format.sidecars import LMHeadSpec

torch.set_num_threads(1)
V, D, N = 131_072, 64, 400
class Reader:
    def read(self, site, rows):
        return torch.randn(len(rows), D, generator=torch.Generator().manual_seed(len(site)))
    def next_tokens(self, rows):
        return rows
weight = torch.randn(V, D, dtype=torch.bfloat16)
decoder = Decoder(Head(LMHeadSpec(norm="rms", dtype="bfloat16"), {"unembed.weight": weight}), most_bytes=V * D)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import numpy as np
maps = {"resid_post.0": {"ridge": Translator.identity(D)}}
scores = judge(maps, "final", np.arange(N), Reader(), decoder)
target = decoder.logits(torch.randn(128, D)).softmax(-1)
decoder.kl_gradient(torch.randn(128, D), target)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"added": (after - before) * 1024, "rows": scores["resid_post.0"]["ridge"].n_rows}))
"""


def test_a_large_vocabulary_takes_bounded_memory() -> None:
    """131,072 tokens: logits of all 400 rows at once would be 210 MB, and five such arrays are alive at a time."""
    shown = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=200)
    found = json.loads(shown.stdout)
    assert found["rows"] == 400
    assert found["added"] < 400 * 2**20
