"""Finite values that storing makes infinite or NaN are counted apart from the model's own, said, and not used."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import residua
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.sealing.losses import SiteLosses, losses_of
from residua.store.verification.verify import verify
from tests.models.tiny import TINY

SITE = "resid_post.1"
DATA = [[3 + (7 * i + j) % 90 for j in range(20)] for i in range(12)]


def model_with_a_massive_channel(dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose residual stream passes 65,504 in channel 3, as that of Gemma 3 does."""
    model: Any = TINY["llama"]()
    model.to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 1e6
    return cast("PreTrainedModel", model)


def computed(model: PreTrainedModel, n_first: int = 0) -> torch.Tensor:
    """Return the rows by the model's own forward pass, (rows, width)."""
    with torch.no_grad():
        states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0] for ids in DATA]
    return torch.cat([state[n_first:] for state in states])


def losses(archive: Archive) -> SiteLosses:
    return losses_of(archive.plan.site(SITE), archive.commits)


@contextmanager
def own_infinities(model: PreTrainedModel) -> Iterator[None]:
    """Let the model itself compute one NaN and one infinity in each example, in channel 0."""

    def change(_module: Any, _args: Any, output: Any) -> Any:
        rows = output if isinstance(output, torch.Tensor) else output[0]
        rows = rows.clone()
        rows[:, 4, 0], rows[:, 5, 0] = torch.nan, torch.inf
        return rows if isinstance(output, torch.Tensor) else (rows, *output[1:])

    layers: Any = model.base_model.layers
    handle = layers[1].register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("codec", ["fast", "raw", "int8-block32"])
@pytest.mark.parametrize("positions", ["all", "every:5", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_overflow_is_counted_apart(
    dtype: torch.dtype, positions: str, codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with_a_massive_channel(dtype)
    with own_infinities(model):
        rows = torch.stack(torch.split(computed(model), 20))
        kept = {"all": slice(None), "every:5": slice(0, None, 5), "last": slice(19, None)}[positions]
        rows = rows[:, kept].flatten(0, 1)
        result = capture_dataset(
            model,
            DATA,
            out=tmp_path / "a.zarr",
            sites=SITE,
            dtype="float16",
            codec=codec,
            rows_per_shard=64,
            positions=positions,
        )
    n_over = int((rows.to(torch.float16).isinf() & rows.isfinite()).sum())
    n_own = int((~rows.isfinite()).sum())
    found = losses(result.archive)
    assert n_over
    assert (found.n_overflowed, found.n_nonfinite) == (n_over, n_own)
    read = result.archive[SITE][:]
    assert found.n_lost == int((~np.isfinite(read)).sum()) - n_own
    assert (found.n_spoiled > 0) == (codec == "int8-block32")
    assert any(SITE in note and f"{n_over:,} finite" in note for note in result.notes)
    again = residua.open(tmp_path / "a.zarr")
    notes: Any = again.provenance["notes"]
    assert [note for note in result.notes if "finite" in note] == [note for note in notes if "finite" in note]
    assert verify(again.path).is_sound
    assert main(["info", str(again.path)]) == 0
    said = capsys.readouterr().out
    assert f"cast from {str(dtype).removeprefix('torch.')}" in said
    assert "exact" not in said
    assert f"{n_over:,} finite" in said
    assert (f"kept as they are: {SITE} {n_own:,}" in said) == bool(n_own)


@pytest.mark.parametrize("codec", ["fast", "int8-block32"])
def test_consumers_refuse_rows_that_lack_values(codec: str, tmp_path: Path) -> None:
    model = model_with_a_massive_channel(torch.bfloat16)
    archive = capture_dataset(
        model, DATA, out=tmp_path / "a.zarr", sites="resid_post.*", dtype="float16", codec=codec
    ).archive
    said = r"resid_post\.\d.* finite values .*Capture it again"
    with pytest.raises(PlanError, match=said):
        archive.loader(SITE, batch_size=8)
    with pytest.raises(PlanError, match=said):
        residua.top(archive, SITE, channel=3, k=2)
    with pytest.raises(PlanError, match=said):
        residua.TunedLens.fit(archive, out=tmp_path / "lens")
    with pytest.raises(PlanError, match=said), residua.replay(model, archive, examples=[0], at=SITE):
        pass
    swap = [{"edit": "swap", "site": SITE, "source": 1}]
    with pytest.raises(PlanError, match=said):
        residua.replay_dataset(model, archive, out=tmp_path / "replay", edits=swap)
    assert not (tmp_path / "replay").exists()
    with pytest.raises(PlanError, match=said):
        residua.fidelity(model, archive.path, n_batches=1)


@pytest.mark.parametrize(
    ("computed_in", "stored", "exact"),
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, "float32", True),
        (torch.float16, "float32", True),
        (torch.float32, "float64", True),
        (torch.float32, "bfloat16", False),
        (torch.float16, "bfloat16", False),
        (torch.bfloat16, "float16", False),
        (torch.float64, "float32", False),
    ],
)
def test_exact_is_said_only_where_no_value_can_have_changed(
    computed_in: torch.dtype, stored: str | None, exact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = cast("Any", TINY["llama"]()), tmp_path / "a.zarr"
    model.to(computed_in)
    result = capture_dataset(model, DATA[:2], out=out, sites=SITE, dtype=stored)
    changed = torch.from_numpy(result.archive[SITE][:]).double() != computed(model)[:40].double()
    assert exact <= (not changed.any())
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert (re.search(r"\bexact\b", said) is not None) == exact
    assert (f"cast from {str(computed_in).removeprefix('torch.')}" in said) == (not exact)
    with residua.Recorder(model, sites=SITE, out=tmp_path / "r.zarr", dtype=stored), torch.no_grad():
        model(torch.tensor(DATA[:2]))
    (site,) = summarise(Archive(tmp_path / "r.zarr")).sites
    assert (site.cast_from is None) == exact


def test_a_recorder_says_so_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, out = model_with_a_massive_channel(torch.float32), tmp_path / "a.zarr"
    with residua.Recorder(model, sites=SITE, out=out, dtype="float16"), torch.no_grad():
        model(torch.tensor(DATA))
    archive = Archive(out)
    assert losses(archive).n_overflowed == int(computed(model).to(torch.float16).isinf().sum())
    assert "finite values are infinite as float16" in caplog.text
    assert any("finite values" in note for note in summarise(archive).notes)


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TINY["llama"]()
    with own_infinities(model):
        result = capture_dataset(model, DATA, out=tmp_path / "a.zarr", sites=SITE, dtype="bfloat16")
    assert losses(result.archive) == SiteLosses(n_nonfinite=2 * len(DATA), n_overflowed=0, n_spoiled=0, rows=())
    assert not any("finite" in note for note in result.notes)
    assert b"n_overflowed" not in b"".join(path.read_bytes() for path in (tmp_path / "a.zarr/commits").iterdir())
    next(iter(result.archive.loader(SITE, batch_size=8)))  # the model's own values are the user's to judge
    assert main(["info", str(tmp_path / "a.zarr")]) == 0
    assert f"kept as they are: {SITE} {2 * len(DATA)}" in capsys.readouterr().out
