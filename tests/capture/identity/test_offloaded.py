"""Models whose weights accelerate keeps on the host or on a disk give the same archives, byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model  # type: ignore[import-untyped]  # it ships no types
from torch import nn
from transformers import PreTrainedModel

import residua
from residua.capture.identity.fingerprint import weights_fingerprint
from residua.capture.runtime.devices import input_device, runs_on_cuda
from residua.store.base.errors import CaptureError
from tests.models.tiny import SPLIT
from tests.stopped import content

CPU = torch.device("cpu")
TOKENS = [list(range(3, 3 + length)) for length in (5, 9, 20, 7)]
OPTIONS: dict[str, Any] = {"sites": "resid_post.*,z.1,logits", "batch_tokens": 48}


def on_host(model: PreTrainedModel, _folder: Path) -> PreTrainedModel:
    cpu_offload(model, execution_device=CPU)
    return model


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    disk_offload(model, str(folder), execution_device=CPU)
    return model


def on_both(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Offload blocks to disk and host; the modules before and after them stay in place."""
    base = model.base_model_prefix
    where: dict[str, Any] = {"lm_head": "cpu"}
    for path, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList):
            where |= {f"{base}.{path}.{index}": place for index, place in enumerate(("disk", "cpu", "disk"))}
        else:
            where[f"{base}.{path}"] = "cpu"
    dispatch_model(model, where, main_device=CPU, offload_dir=str(folder), force_hooks=True)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("offload", [on_host, on_disk, on_both])
def test_an_offloaded_model_writes_the_archive_of_the_plain_one(
    name: str, offload: Callable[[PreTrainedModel, Path], PreTrainedModel], tmp_path: Path
) -> None:
    """GPT-2 has its unembedding tied to the embedding."""
    plain, offloaded = SPLIT[name](), offload(SPLIT[name](), tmp_path / "weights")
    assert any(parameter.is_meta for parameter in offloaded.parameters()), "nothing is offloaded: no test"
    assert weights_fingerprint(offloaded) == weights_fingerprint(plain)
    assert (input_device(offloaded), runs_on_cuda(offloaded)) == (CPU, False)
    for model, out in ((plain, "plain.zarr"), (offloaded, "offloaded.zarr")):
        residua.capture_dataset(model, TOKENS, out=tmp_path / out, **OPTIONS)
    assert content(tmp_path / "offloaded.zarr") == content(tmp_path / "plain.zarr")
    with residua.Recorder(offloaded, sites=OPTIONS["sites"], out=tmp_path / "recorded.zarr"), torch.no_grad():
        offloaded(torch.tensor([TOKENS[2]]))
    recorded, captured = residua.open(tmp_path / "recorded.zarr"), residua.open(tmp_path / "plain.zarr")
    rows = slice(14, 34)
    assert recorded.n_rows == 20
    assert all(np.allclose(recorded[site].numpy(), captured[site].numpy()[rows], atol=1e-5) for site in captured)


def test_a_weight_without_values_anywhere_is_refused_by_name() -> None:
    model = SPLIT["llama"]()
    model.get_submodule("lm_head").to("meta")
    with pytest.raises(CaptureError, match=r"'lm_head\.weight' is on the meta device.*accelerate"):
        weights_fingerprint(model)
