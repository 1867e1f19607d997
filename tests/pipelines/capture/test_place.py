"""A capture, a recording and a fidelity try their place before the model runs."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import PlanError
from tests.models.tiny import TINY


def test_the_model_does_not_run_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_calls = TINY["llama"](), 0
    archive = capture_dataset(model, [[5, 6, 7]] * 3, out=tmp_path / "b.zarr", sites="resid_post.1", dtype="bfloat16")

    def count(*_: Any) -> None:
        nonlocal n_calls
        n_calls += 1

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    model.register_forward_pre_hook(count)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="s3"):
        capture_dataset(model, [[5, 6, 7]], out="s3://bucket/a.zarr", sites="embed")
    with pytest.raises(PlanError, match="s3"):
        residua.Recorder(model, sites="embed", out="s3://bucket/a.zarr")
    with pytest.raises(PlanError, match="s3"):
        residua.replay_dataset(model, archive.archive, out="s3://bucket/a", at="resid_post.1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fail)
        with pytest.raises(OSError, match=r"a\.zarr.*no hard links"):
            capture_dataset(model, [[5, 6, 7]], out=tmp_path / "a.zarr", sites="embed")
        with pytest.raises(OSError, match=r"a\.zarr.*no hard links"):
            residua.Recorder(model, sites="embed", out=tmp_path / "a.zarr")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"fidelity\.json"):
            residua.fidelity(archive.archive.path, model, n_batches=1)
    assert n_calls == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b.zarr"]
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert n_calls == 1
