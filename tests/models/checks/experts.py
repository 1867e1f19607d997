"""What is checked of mixtures of experts and of latents: identities over what modules took and gave, and their weights.

Each holds in most models of the kind; where one does not, the site stays unproved, since a model may do otherwise.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tests.models.checks.truth import LOGITS, ModuleLog, difference, is_same


class Judge(Protocol):
    """Notes that a site of a block is proved; see `tests.models.findings.Record`."""

    def judge(self, kind: str, layer: int | None, good: bool, text: str, how: str) -> None:
        """Note the result of a check."""
        ...


def check_experts(model: nn.Module, judge: Judge, log: ModuleLog, layer: int, rows: Mapping[str, Tensor]) -> None:
    """Check the routing of one block, and what its experts give.

    Args:
        model: The model.
        judge: Takes what is proved.
        log: What the modules took and gave for the example of the rows.
        layer: The block.
        rows: From kind to the rows of one example, of the kinds that the block has.
    """
    if {"router_logits", "expert_index"} <= set(rows) and _chooses(rows["router_logits"], rows["expert_index"]):
        for kind in ("router_logits", "expert_index"):
            judge.judge(kind, layer, True, "", "the largest logits are chosen")
    if {"expert_index", "expert_weight", "routed_out"} <= set(rows) and _is_routed(model, log, rows):
        for kind in ("expert_index", "expert_weight", "routed_out"):
            judge.judge(kind, layer, True, "", "the experts' weights applied to what they took")
    if {"routed_out", "mlp_out"} <= set(rows):
        total = (
            rows["routed_out"].double() + rows["shared_out"].double() if "shared_out" in rows else rows["routed_out"]
        )
        good = difference(total + _bias(model, rows["mlp_out"].double() - total), rows["mlp_out"]) <= LOGITS
        text = "routed_out and shared_out do not add up to mlp_out"
        for kind in ("routed_out", *(("shared_out",) if "shared_out" in rows else ())):
            judge.judge(kind, layer, good, text, "mlp_out")


def check_latent(model: nn.Module, judge: Judge, log: ModuleLog, layer: int, rows: Mapping[str, Tensor]) -> None:
    """Check that a linear map takes the latent of a block, and gives the values of all heads among its numbers."""
    v = rows["v"]
    for path, taken in log.taken.items():
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear) or not any(is_same(each.float(), rows["kv_latent"]) for each in taken):
            continue
        given = log.given[path][0].float().reshape(len(v), v.shape[1], -1)
        if difference(given[..., -v.shape[2] :], v) <= LOGITS:
            judge.judge("kv_latent", layer, True, "", "v is a part of what a linear map gives of it")


def _chooses(logits: Tensor, index: Tensor) -> bool:
    """Return whether the experts of each token are those of the largest logits."""
    best = logits.topk(index.shape[-1], dim=-1).indices
    return torch.equal(best.sort(-1).values, index.long().sort(-1).values)


def _bias(model: nn.Module, rest: Tensor) -> Tensor:
    """Return the parameter that each of these rows is, which a mixture adds after its experts (JetMoE); or zeros."""
    biases = (each.detach().double() for each in model.parameters() if each.shape == rest.shape[-1:])
    same = (bias for bias in biases if bias.any() and difference(rest, bias.expand_as(rest)) <= LOGITS)
    return next(same, torch.zeros_like(rest))


def _is_routed(model: nn.Module, log: ModuleLog, rows: Mapping[str, Tensor]) -> bool:
    """Return whether some experts of the model, applied by hand to what they took, give these rows."""
    index, weight, wanted = rows["expert_index"].long(), rows["expert_weight"].double(), rows["routed_out"]
    for path, taken in log.taken.items():
        experts: Any = model.get_submodule(path)
        up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
        if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or not hasattr(experts, "act_fn"):
            continue
        hidden = taken[0].double().reshape(-1, taken[0].shape[-1])
        if len(hidden) != len(index) or up.shape[-1] != hidden.shape[-1]:
            continue
        with torch.no_grad():
            gate, linear = torch.einsum("td,tkid->tki", hidden, up.double()[index]).chunk(2, -1)
            each = torch.einsum("tki,tkdi->tkd", experts.act_fn(gate) * linear, down.double()[index])
        if difference((each * weight[..., None]).sum(1), wanted) <= LOGITS:
            return True
    return False
