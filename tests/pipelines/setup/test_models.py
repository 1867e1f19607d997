"""A pipeline of tensor-parallel stages loads through one corrected step of transformers; another step is refused.

That it is still needed, and works, is tested with real processes: `stages_in_parallel_of` in
tests/distributed/model_parallel/capture_cases.py fails as soon as transformers loads such a model by itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers.distributed import mixin
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from residua.capture.identity.provenance import describe_model
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import load_model, stages_in_parallel
from residua.store.base.errors import PlanError
from tests.models.tiny import TINY

STEP = "apply_tensor_parallelism"
WORDS = r"tp= and pp= .* transformers 5\.23"


def test_what_other_stages_have_is_left_out_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    monkeypatch.setattr(mixin, STEP, lambda *arguments: plans.append(arguments[2]))
    before = vars(mixin)[STEP]
    model = nn.ModuleDict({"here": nn.Linear(2, 2), "there": PipelineIdentityLayer()})  # type: ignore[no-untyped-call]  # theirs
    plan = {"here": "colwise", "here.weight": "colwise", "there": "rowwise", "there.up": "x", "there.weight": "rowwise"}
    with stages_in_parallel():
        vars(mixin)[STEP](model, None, plan)
    assert plans == [{"here": "colwise", "here.weight": "colwise"}]
    assert vars(mixin)[STEP] is before


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = vars(mixin)[STEP]
    with pytest.raises(PlanError, match=WORDS), stages_in_parallel():
        pass  # nothing called the step
    with pytest.raises(PlanError, match=WORDS), stages_in_parallel():
        raise KeyError("model.layers.2.self_attn")
    with pytest.raises(OSError, match="no such checkpoint"), stages_in_parallel():
        raise OSError("no such checkpoint")
    assert vars(mixin)[STEP] is before
    monkeypatch.delattr(mixin, STEP)
    with pytest.raises(PlanError, match=WORDS), stages_in_parallel():
        raise AssertionError("nothing is loaded")


def test_loading_leaves_the_random_state_of_the_caller(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_model(str(tmp_path), CaptureSettings(sites="resid_post.*", device="cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("revision", [None, "main", "0123456789abcdef0123456789abcdef01234567"])
def test_a_model_of_the_hub_knows_its_commit(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    TINY["gpt2"]().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("org/tiny", str(repository / "snapshots" / commit)):
        model = load_model(name, CaptureSettings(device="cpu", revision=revision))
        assert describe_model(model, {})["revision"] == commit
    model.save_pretrained(tmp_path / "mine")
    assert describe_model(load_model(str(tmp_path / "mine"), CaptureSettings(device="cpu")), {})["revision"] is None
