"""Models with sharded weights run without autograd, and with the values of one process."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from residua.capture.runtime.sharded import without_gradients
from tests.distributed.layouts.tensor_parallel_llama import parallel_llama
from tests.models.tiny import SPLIT


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Linears(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it bare
    """Counts the linears that reach the dispatcher whole."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.n += func is torch.ops.aten.linear.default
        return func(*args, **(kwargs or {}))


def parallel() -> nn.Module:
    return parallel_llama(init_device_mesh("cpu", (1,)))


def sharded() -> nn.Module:
    model = SPLIT["llama"]()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize("make", [parallel, sharded])
@pytest.mark.parametrize("shape", [(1, 7), (3, 16)])
def test_sharded_weights_run_without_whole_linears(make: type[nn.Module], shape: tuple[int, int]) -> None:
    """DTensor has no rule for them, and would derive one for each shape."""
    model, plain = make(), SPLIT["llama"]()
    ids = torch.arange(shape[0] * shape[1]).view(shape) % 90
    with without_gradients(model), Linears() as linears:  # type: ignore[no-untyped-call]  # torch leaves it bare
        found = model(ids).logits
    with torch.inference_mode():
        wanted = plain(ids).logits
    assert linears.n == 0
    assert not found.requires_grad
    assert torch.equal(found, wanted)


def test_a_plain_model_runs_in_inference_mode() -> None:
    with without_gradients(SPLIT["gpt2"]()):
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
