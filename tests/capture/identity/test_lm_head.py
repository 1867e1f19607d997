"""The files of the LM head, and the models that have them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from transformers import PreTrainedModel

from residua.capture.identity.few_tokens import run_few_tokens
from residua.capture.identity.lm_head import array_of, lm_head_files
from residua.capture.layout.layouts import shard_reports
from residua.store.encoding.safetensors_file import safetensors_file
from residua.store.storage.files import write_file
from tests.capture.site_readings import everything
from tests.lm_heads import save_lm_head
from tests.models.tiny import TINY


@pytest.fixture
def _one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=cast("Any", dist).HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_parameters_are_the_models_own(tmp_path: Path) -> None:
    model = everything("phi", torch.bfloat16).model
    assert save_lm_head(model, tmp_path / "head")
    stored, weights = load_file(tmp_path / "head" / "head.safetensors"), model.state_dict()
    origin = {
        "norm.weight": "model.final_layernorm.weight",
        "norm.bias": "model.final_layernorm.bias",
        "unembed.weight": "lm_head.weight",
        "unembed.bias": "lm_head.bias",
    }
    assert set(stored) == set(origin)
    assert all(torch.equal(stored[name], weights[path]) for name, path in origin.items())
    assert stored["norm.weight"].dtype == torch.bfloat16


def in_fsdp2(model: PreTrainedModel) -> nn.Module:
    for block in cast("nn.ModuleList", model.base_model.layers):
        fully_shard(block)
    assert isinstance(fully_shard(model), FSDPModule)
    return model


def in_fsdp1(model: PreTrainedModel) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("_one_process_group")
@pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*FullyShardedDataParallel", "ignore:.*NO_SHARD")
@pytest.mark.parametrize("shard", [in_fsdp1, in_fsdp2])
def test_weights_that_fsdp_frees_later_are_copied(shard: Callable[[PreTrainedModel], nn.Module]) -> None:
    model = TINY["llama"]()
    wanted = [buffer.copy() for buffer in lm_head_files(model)["head.safetensors"] if isinstance(buffer, np.ndarray)]
    sharded = shard(model)
    run_few_tokens(sharded)  # norm and unembedding stay full
    found = [buffer for buffer in lm_head_files(sharded)["head.safetensors"] if isinstance(buffer, np.ndarray)]
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    sharded.state_dict()  # frees them
    assert len(found) == len(wanted) == 2
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("_one_process_group")
def test_reports_of_shards_leave_their_memory_free() -> None:
    for shard in (torch.ones(5), torch.ones(4, 6)[:, ::2], torch.ones(2, 3).to(torch.bfloat16)):
        storage = shard.untyped_storage()
        shard_reports(shard, dist.group.WORLD)
        storage.resize_(0)  # as FSDP does; torch refuses it for memory that NumPy has seen
        assert storage.size() == 0


def test_the_config_is_one_that_transformers_reads(tmp_path: Path) -> None:
    model = TINY["gemma2"]()
    save_lm_head(model, tmp_path)
    assert type(model.config).from_pretrained(tmp_path).hidden_size == 32
    spec = json.loads((tmp_path / "head.json").read_text())
    assert (spec["norm"], spec["weight_offset"], spec["softcap"]) == ("rms", 1.0, 10.0)


def test_a_model_without_a_head_has_no_files(tmp_path: Path) -> None:
    assert not save_lm_head(TINY["llama"]().base_model, tmp_path)
    assert not save_lm_head(torch.nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_every_dtype_are_written_without_a_copy(tmp_path: Path) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in floats}
    tensors |= {
        "codes": torch.arange(7, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "one": torch.tensor([2], dtype=torch.int64),
    }
    arrays = {name: array_of(tensor) for name, tensor in tensors.items()}
    _, _, *buffers = safetensors_file(arrays)
    assert [buffer.ctypes.data for buffer in buffers if isinstance(buffer, np.ndarray) and buffer.size] == [
        tensor.data_ptr() for tensor in tensors.values() if tensor.numel()
    ]
    write_file(tmp_path / "a.safetensors", safetensors_file(arrays))
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
