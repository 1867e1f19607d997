"""Reproducing an archive: equal bit for bit by the same model, and not by another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.reproduce import reproduce
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError
from residua.store.encoding.shard import shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.read.archive import Archive
from tests.models.tiny import TINY, VOCABULARY

MODEL = "models/pydoc-1m"


def captured(out: Path, **options: Any) -> Path:
    rng = np.random.default_rng(1)
    data = [rng.integers(3, VOCABULARY, length).tolist() for length in (9, 30, 4, 17, 25, 8)]
    settings: dict[str, Any] = {
        "sites": "resid_post.*,pattern.0,q.1",
        "rows_per_shard": 16,
        "batch_tokens": 40,
        **options,
    }
    capture_dataset(TINY["llama"](), data, out=out, **settings)
    return out


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_same_model_gives_the_same_bits(dtype: str | None, tmp_path: Path) -> None:
    model = TINY["llama"]()
    model.set_attn_implementation("eager")
    found = reproduce(model, captured(tmp_path / "a.zarr", dtype=dtype), n_batches=99)
    assert found.is_exact
    assert {site.rows for site in found.sites.values()} == {93}
    assert found.differences == ()


def test_a_changed_value_is_seen(tmp_path: Path) -> None:
    """Two shards are swapped, so every checksum still fits and only the model shows it."""
    out = captured(tmp_path / "a.zarr", sites="resid_post.1", codec="raw")
    spec = next(spec for spec in _specs(out) if spec.path == "sites/resid_post/1")
    one, two = (shard_path(out, spec, shard) for shard in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    found = reproduce(TINY["llama"](), out, n_batches=99)
    assert not found.is_exact
    assert found.sites["resid_post.1"].largest_error > 0


def _specs(out: Path) -> tuple[ArraySpec, ...]:
    return Archive(out).plan.arrays


def test_another_model_is_refused(tmp_path: Path) -> None:
    out = captured(tmp_path / "a.zarr", sites="embed")
    other = TINY["llama"]()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(PlanError, match="weights"):
        reproduce(other, out)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_another_attention_is_refused(attention: str, tmp_path: Path) -> None:
    """A replay would only note it, but then bits may differ."""
    model = TINY["llama"]()
    model.config._attn_implementation = attention  # is compared before the model runs
    with pytest.raises(PlanError, match=rf"attention: sdpa .* {attention} here"):
        reproduce(model, captured(tmp_path / "a.zarr", sites="embed"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.zarr")
    capture_dataset(MODEL, ["def f(x):", "class A: pass"], out=out, sites="resid_post.*")
    assert main(["reproduce", out, "--model", MODEL]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
