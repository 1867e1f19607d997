"""What is refused, and on which ranks: both ranks of a launch run each check and assert what they see."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import PreTrainedModel

from residua.capture.layout.parameters import full_parameter
from residua.capture.taps.tap import TapGroup, tap
from residua.store.base.errors import CaptureError
from tests.distributed.checks.replay import replays
from tests.distributed.layouts.case import relative_error
from tests.distributed.layouts.deepspeed_and_fairscale import zero3
from tests.distributed.layouts.single_process import batch, loss_of, site_names
from tests.models.tiny import SPLIT


class Load(Protocol):
    """Load a model with transformers' own parallelism, tensor parallel if nothing else is said."""

    def __call__(self, name: str = ..., **config: int) -> PreTrainedModel: ...


def run(model: nn.Module, seed: int = 0, **size: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch(seed, **size)).logits
    return logits


def nothing(_site: str, _tensor: Tensor) -> None:
    return None


def different_tokens(load: Load) -> None:
    """Ranks that should share a batch and do not are found out by the checksum."""
    model, rank = SPLIT["llama"](), dist.get_rank()
    words = rf"'resid_post\.1' on rank {rank}.*cannot be proved.*different tokens.*rank 1: \[4, 10, 32\]"
    with pytest.raises(CaptureError, match=words), tap(model, "resid_post.1", nothing, tensor_parallel=world()):
        run(model, seed=rank)


def partial_sums(load: Load) -> None:
    """What the ranks have of a sum before it is summed has the shape of the whole and other values."""
    model = by_hand()
    words = r"'module:model\.layers\.1\.mlp\.down_proj@output' on rank \d: .*cannot be proved.*not yet added up"
    with (
        pytest.raises(CaptureError, match=words),
        tap(model, "module:model.layers.1.mlp.down_proj", nothing, tensor_parallel=world()),
    ):
        run(model)


def a_group_that_is_not_known(load: Load) -> None:
    """A model split by hand shows no group: parts are refused, until the user says who holds them."""
    model, kept = by_hand(), dict[str, Tensor]()
    words = rf"Site 'mlp_act\.1' on rank {dist.get_rank()} .*\[4, 10, 49\].*\[4, 10, 98\].*tensor_parallel="
    with pytest.raises(CaptureError, match=words), tap(model, "mlp_act.1", nothing):
        run(model)
    with tap(model, "mlp_act.1", kept.__setitem__, tensor_parallel=world()):
        run(model)
    bare, expected = SPLIT["llama"](), dict[str, Tensor]()
    with tap(bare, "mlp_act.1", expected.__setitem__, tensor_parallel=alone()):
        run(bare)
    assert list(kept) == (["mlp_act.1"] if dist.get_rank() == 0 else [])
    assert all(relative_error(value, expected[site]) < 1e-5 for site, value in kept.items())


def functions_that_fail(load: Load) -> None:
    """The owner raises what its function raised; the others raise too, and say where it happened."""
    model = load()
    before = run(model)
    wrong: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
        (lambda tensor: tensor[:, :1], CaptureError, r"'z\.1' on rank 0 holds float32\[4, 10, 8, 4\].*\[4, 1, 8, 4\]"),
        (lambda tensor: tensor.double(), CaptureError, "float64"),
        (lambda tensor: tensor[99], IndexError, "out of bounds"),
    ]
    for function, error, words in wrong:
        there = CaptureError if dist.get_rank() else error
        expected = rf"Site 'z\.1' on rank 1: .*failed on rank 0: .*{words}" if dist.get_rank() else words
        with pytest.raises(there, match=expected), tap(model, "z.1", partial(ignoring_site, function)):
            run(model)
        assert torch.equal(run(model), before)


def ignoring_site(function: Callable[[Tensor], Any], _site: str, tensor: Tensor) -> Any:
    return function(tensor)


def parts_without_gathering(load: Load) -> None:
    """With gather=False every rank sees its own part, and what it gives back replaces that part."""
    model, kept = load(), dict[str, Tensor]()
    before = run(model)
    with tap(model, "q.1,mlp_act.1,resid_post.1", kept.__setitem__, gather=False):
        run(model)
    shapes = {site: tuple(value.shape) for site, value in kept.items()}
    assert shapes == {"q.1": (4, 10, 4, 4), "mlp_act.1": (4, 10, 49), "resid_post.1": (4, 10, 32)}
    zeros: list[Tensor] = []
    for gather in (True, False):
        with tap(model, "z.1", lambda _site, tensor: torch.zeros_like(tensor), gather=gather):
            zeros.append(run(model))
    assert torch.equal(zeros[0], zeros[1])
    assert not torch.equal(zeros[0], before)


def later_batches_and_switches(load: Load) -> None:
    """Layouts proved on one batch hold for batches of other shapes; a switched-off group costs no agreement."""
    model, bare, group = load(), SPLIT["llama"](), TapGroup()
    for size in ({}, {"n_examples": 2, "length": 7}, {"n_examples": 1, "length": 30}):
        got, wanted = dict[str, Tensor](), dict[str, Tensor]()
        names = site_names(model, "llama")
        with tap(bare, names, wanted.__setitem__, tensor_parallel=alone()):
            run(bare, **size)
        with tap(model, names, got.__setitem__, group=group):
            run(model)
            run(model, **size)
            with group.off():
                run(model, n_examples=3, length=4)
        if dist.get_rank() == 0:
            assert all(relative_error(got[site], value) < 1e-5 for site, value in wanted.items())


def a_site_that_never_fires(load: Load) -> None:
    model = load()
    setattr(model.get_submodule("model.layers.1.mlp"), "forward", nn.Identity().forward)  # noqa: B010 - mypy's wish
    words = rf"Site 'mlp_act\.1' on rank {dist.get_rank()} \(model\.layers\.1\.mlp\.down_proj input\).* never met"
    with pytest.raises(CaptureError, match=words), tap(model, "mlp_act.1", nothing):
        run(model)


def replicas_with_unequal_batches(load: Load) -> None:
    """Replicas do not wait for each other: one has three batches of its own size, the other one."""
    model = nn.parallel.DistributedDataParallel(SPLIT["gpt2"]())
    rank, kept = dist.get_rank(), list[Tensor]()
    with tap(model, "resid_post.1", lambda _site, tensor: kept.append(tensor)):
        for step in range(3 - 2 * rank):
            run(model.module, seed=step, n_examples=1 + rank, length=5 + step)
    assert [tuple(value.shape) for value in kept] == ([(1, 5, 32), (1, 6, 32), (1, 7, 32)], [(2, 5, 32)])[rank]


def rows_inside_experts(load: Load) -> None:
    """Which rows an expert sees differs from rank to rank."""
    model = load("mixtral", tp_size=2, ep_size=2)
    with pytest.raises(CaptureError), tap(model, "module:model.layers.1.mlp.experts.act_fn", nothing):
        run(model)


def generation(load: Load) -> None:
    """Every step of a generation fires, with the cache's keys in front of the new ones."""
    got, wanted = list[tuple[str, Tensor]](), list[tuple[str, Tensor]]()
    model, bare = load(), SPLIT["llama"]()
    sites = "resid_post.1,q.1,k.1,z.1,pattern.1,mlp_act.1,logits"
    with tap(bare, sites, lambda site, tensor: wanted.append((site, tensor)), tensor_parallel=alone()):
        expected = generate(bare)
    with tap(model, sites, lambda site, tensor: got.append((site, tensor))):
        assert torch.equal(generate(model), expected)
    assert len(wanted) >= 7 * 2
    if dist.get_rank() == 0:
        assert [site for site, _ in got] == [site for site, _ in wanted]
        assert all(relative_error(mine, theirs) < 1e-5 for (_, mine), (_, theirs) in zip(got, wanted, strict=True))


def generate(model: Any) -> Tensor:
    prompt = {key: batch(0)[key][:1] for key in ("input_ids", "attention_mask")}
    tokens: Tensor = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return tokens


def parameters(load: Load) -> None:
    """A parameter and its gradient come whole, under the bare model's name, however they are sharded."""
    bare = SPLIT["llama"]()
    loss_of(bare, batch(0)).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    wrapped = FullyShardedDataParallel(SPLIT["llama"](), device_id=torch.device("cpu"), use_orig_params=True)
    copied = nn.parallel.DistributedDataParallel(SPLIT["llama"]())
    models: tuple[Any, ...] = (load(), fully_shard(SPLIT["llama"]()), wrapped, copied, zero3(SPLIT["llama"]()))
    for model in models:
        loss_of(model, batch(0)).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
            assert torch.equal(full_parameter(model, name), bare.get_parameter(name))
            wanted = bare.get_parameter(name).grad
            assert wanted is not None
            assert relative_error(full_parameter(model, name, gradient=True), wanted) < 2e-5
    words = rf"'model\.norm\.bias' .* on rank {dist.get_rank()}.* no such parameter"
    with pytest.raises(CaptureError, match=words):
        full_parameter(bare, "model.norm.bias")


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def alone() -> dist.ProcessGroup:
    """A group of this rank alone; both ranks have to make all groups."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    assert isinstance(group, dist.ProcessGroup)
    return group


def by_hand() -> PreTrainedModel:
    """A Llama whose MLPs are split over the ranks by hand, as one's own code might do it."""
    model, rank = SPLIT["llama"](), dist.get_rank()
    for layer in range(3):
        mlp = model.get_submodule(f"model.layers.{layer}.mlp")
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = mlp.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(linear.weight.chunk(2, dim)[rank].contiguous())
        mlp.register_forward_hook(summed)
    return model


def summed(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    output = output.clone()
    dist.all_reduce(output)
    return output


CHECKS = (
    different_tokens,
    partial_sums,
    a_group_that_is_not_known,
    functions_that_fail,
    parts_without_gathering,
    later_batches_and_switches,
    a_site_that_never_fires,
    replicas_with_unequal_batches,
    rows_inside_experts,
    generation,
    parameters,
    replays,
)
