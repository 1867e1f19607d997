"""What a capture makes of the model that it is given: data types, config, and models that it refuses."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import LlamaConfig, PreTrainedModel

from residua.pipelines.capture.capture import capture_dataset
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from residua.store.read.summary import summarise
from residua.store.verification.verify import verify
from tests.models.tiny import TINY

TOKENS = [[5, 6, 7, 8], [9, 10]]
ROUTER = "module:model.layers.0.mlp.router"


class Routed(nn.Module):
    """An MLP with a router that computes in float32, as in many mixtures of experts."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.router = nn.Linear(width, 3, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden.float()).softmax(-1)
        out: Tensor = self.mlp(hidden) * scores.amax(-1, keepdim=True).to(hidden.dtype)
        return out


def routed() -> PreTrainedModel:
    torch.manual_seed(0)
    model = TINY["llama"]()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.get_submodule("model.layers.0").mlp = Routed(model.get_submodule("model.layers.0.mlp"), 32)
    return model


def test_a_site_that_computes_wider_than_the_model_is_stored_as_it_computes(tmp_path: Path) -> None:
    model = routed()
    seen: list[Tensor] = []
    hook = model.get_submodule("model.layers.0.mlp.router").register_forward_hook(
        lambda *a: seen.append(a[2].detach().flatten(0, 1))
    )
    with torch.inference_mode():
        model(torch.tensor(TOKENS[:1]))
    hook.remove()
    archive = capture_dataset(model, TOKENS[:1], out=tmp_path / "own.zarr", sites=f"{ROUTER},resid_post.0").archive
    assert [str(archive[site].stored_dtype) for site in archive.sites] == ["bfloat16", "float32"]
    assert np.array_equal(archive[f"{ROUTER}@output"][:], seen[0].numpy())
    asked = capture_dataset(model, TOKENS[:1], out=tmp_path / "b.zarr", sites=ROUTER, dtype="bfloat16").archive
    assert str(asked[f"{ROUTER}@output"].stored_dtype) == "bfloat16"


def test_only_the_keys_of_a_config_that_differ_are_named(tmp_path: Path) -> None:
    model = TINY["llama"]()
    capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", sites="embed")
    assert isinstance(model.config, LlamaConfig)
    model.config.rms_norm_eps = 1e-3
    model.config.rope_parameters = {**(model.config.rope_parameters or {}), "rope_theta": 77.0}
    with pytest.raises(PlanError, match="begun with another plan") as caught:
        capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", sites="embed")
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.partition(":")[0].strip() for line in lines] == [
        "model.config.rms_norm_eps",
        "model.config.rope_parameters.rope_theta",
    ]
    assert lines[0].endswith("this run has 0.001")


def test_any_other_model_is_sent_to_the_recorder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a Linear: .*residua\.Recorder"):
        capture_dataset(nn.Linear(2, 2), TOKENS, out=tmp_path / "a.zarr")  # type: ignore[arg-type]  # that is the point
    assert list(tmp_path.glob("*.zarr")) == []


def test_without_the_head_the_plan_and_the_rows_are_the_same(tmp_path: Path) -> None:
    model = TINY["llama"]()
    result = capture_dataset(model, TOKENS, out=tmp_path / "a.zarr", sites="embed")
    bare = capture_dataset(model, TOKENS, out=tmp_path / "b.zarr", sites="embed", head=False)
    assert (summarise(result.archive).has_head, summarise(bare.archive).has_head) == (True, False)
    assert not (tmp_path / "b.zarr/head/head.safetensors").exists()
    assert bare.archive.plan.digest == result.archive.plan.digest
    assert verify(tmp_path / "b.zarr").is_sound
    again = capture_dataset(model, TOKENS, out=tmp_path / "b.zarr", sites="embed", head=True)
    assert again.resumed


def test_an_archive_is_opened_again_only_after_its_commits_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = 0, Archive.__init__

    def counted(archive: Archive, path: Path, **settings: Any) -> None:
        nonlocal opened
        opened += 1
        plain(archive, path, **settings)

    monkeypatch.setattr(Archive, "__init__", counted)
    for _ in ("fresh", "resumed"):
        opened = 0
        assert capture_dataset(TINY["llama"](), TOKENS, out=tmp_path / "a.zarr", sites="embed").archive.is_sealed
        assert opened == 2


def test_a_model_that_is_loaded_here_is_split_here(tmp_path: Path) -> None:
    group = cast("ProcessGroup", object())
    with pytest.raises(PlanError, match=r"a folder is split with tp=2"):
        capture_dataset("models/pydoc-1m", TOKENS, out=tmp_path / "a.zarr", tensor_parallel=group)
    assert not any(tmp_path.iterdir())
