"""A tap leaves nothing behind on a distributed model, also if its function fails.

Both ranks of a launch run these checks.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from residua.capture.taps.tap import tap
from tests.distributed.checks.refusals import Load, run
from tests.distributed.layouts.data_parallel_rows import sharded
from tests.distributed.layouts.single_process import batch, loss_of
from tests.distributed.layouts.tensor_parallel_llama import parallel_llama
from tests.models.tiny import SPLIT

SITES = "resid_pre.1,q.1,z.1,pattern.1,mlp_act.1,mlp_out.1,logits"
HOW: tuple[dict[str, bool], ...] = ({}, {"backward": True}, {"differentiable": True}, {"gather": False})


class BoomError(Exception):
    pass


def state_of(model: nn.Module) -> list[object]:
    """Every hook and every replaced method of a model, and its state dict."""
    kinds = [name for name in vars(nn.Module()) if "hooks" in name]
    hooks = [(path, kind, dict(vars(part)[kind])) for path, part in model.named_modules() for kind in kinds]
    forwards = [(path, vars(part).get("forward")) for path, part in model.named_modules()]
    weights = [(path, id(value)) for path, value in model.state_dict(keep_vars=True).items()]
    return [hooks, forwards, weights, [type(part) for part in model.modules()]]


def leaving_leaves_nothing_behind(load: Load) -> None:
    models: dict[str, Any] = {
        "tensor parallel": load(),
        "sequence parallel": parallel_llama(init_device_mesh("cpu", (2,)), sequence=True),
        "pipeline": load(pp_size=2),
        "DDP": nn.parallel.DistributedDataParallel(SPLIT["llama"](), find_unused_parameters=True),
        "FSDP2": sharded(SPLIT["llama"]()),
    }
    for layout, model in models.items():
        logits = run(model)  # the first run may add hooks of its own
        before = state_of(model)
        for options in HOW:
            for fails in (False, True):
                if fails and "parallel" not in layout:
                    continue  # DDP and FSDP2 are left in the middle of work of their own; a next stage waits
                with pytest.raises(Exception, match="on purpose") if fails else nullcontext():
                    tapped_once(model, options, fails=fails)
                assert state_of(model) == before, f"{layout}, {options}, fails: {fails}"
        assert torch.equal(run(model), logits), layout


def tapped_once(model: nn.Module, options: dict[str, bool], *, fails: bool) -> None:
    def change(site: str, tensor: Tensor) -> Tensor:
        if fails and site == "mlp_act.1":
            raise BoomError("on purpose")
        return tensor * 2

    sites = SITES.replace("logits", "final") if options.get("backward") else SITES
    with tap(model, sites, change, **options):  # type: ignore[arg-type]  # one dict for all options
        if options.get("backward") or options.get("differentiable"):
            loss_of(model, batch(0)).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        else:
            run(model)
    model.zero_grad()


CHECKS = (leaving_leaves_nothing_behind,)
