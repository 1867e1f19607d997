"""What one process computes: values, gradients and edited logits of every site, to compare with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from residua.capture.forward.inputs import positions_of
from residua.capture.sites.reference_model import unsharded_sites
from residua.capture.taps.reading import reading
from residua.capture.taps.tap import tap
from tests.models.tiny import VOCABULARY

MODULES = {
    "gpt2": ["module:transformer.h.1.mlp@output"],
    "mixtral": [f"module:model.layers.1.mlp{part}@output" for part in ("", ".gate", ".experts")],
}
EDITED = ("embed", "resid_pre.2", "resid_mid.1", "q.1", "z.1", "pattern.1", "mlp_act.1", "mlp_out.1", "resid_post.0")
TRAINED = ("resid_post.0", "z.1")
Edit = Callable[[str, Tensor], Tensor]


def batch(seed: int, *, n_examples: int = 4, length: int = 10) -> dict[str, Any]:
    """Token ids with padding on the right of every second example."""
    ids = torch.randint(3, VOCABULARY, (n_examples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1::2, -3:] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}


OF_EXPERTS = ("router_logits", "expert_index", "expert_weight", "routed_out", "shared_out")


def site_names(model: nn.Module, name: str) -> list[str]:
    """Every canonical site that the architecture has, and modules of it; those of experts only whole models have."""
    sites = [site for site in unsharded_sites(model, ["*"]) if site.partition(".")[0] not in OF_EXPERTS]
    return [*sites, *MODULES.get(name, ["module:model.layers.1.mlp@output"])]


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A loss that every site has a part in, the same under every layout."""
    logits: Tensor = model(**inputs).logits
    return logits.float().square().mean()


def vector(width: int) -> Tensor:
    return torch.linspace(-1, 1, width)


EDITS: dict[str, Edit] = {
    "zero": lambda _site, tensor: torch.zeros_like(tensor),
    "add a vector": lambda _site, tensor: tensor + vector(tensor.shape[-1]).to(tensor.dtype),
    "replace": lambda _site, tensor: tensor.flip(0).contiguous(),
}


@dataclass(frozen=True)
class Expected:
    """What the bare model gives for one batch in one process."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    logits: Tensor
    edited: dict[tuple[str, str], Tensor]
    trained: dict[str, Tensor]


def expected(model: nn.Module, name: str, inputs: Mapping[str, Any], *, edits: bool = True) -> Expected:
    """Run the bare model; values and edits with `reading`, which knows of no layout."""
    values: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    names = site_names(model, name)
    with reading(model, names, lambda site, tensor: values.update({site: tensor.clone()})), torch.no_grad():
        logits = model(**inputs).logits
    with tap(model, names, gradients.__setitem__, backward=True):
        loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    model.zero_grad()
    edited = {}
    for site in (site for site in EDITED if site in values and edits):
        for kind, edit in EDITS.items():
            with reading(model, site, edit), torch.no_grad():
                edited[site, kind] = model(**inputs).logits
    inside = {site: trained(model, site, values[site].shape[-1], inputs) for site in TRAINED}
    return Expected(
        values, gradients, logits, edited, {site: found for site, found in inside.items() if found is not None}
    )


def trained(
    model: nn.Module, site: str, width: int, inputs: Mapping[str, Any], group: ProcessGroup | None = None
) -> Tensor | None:
    """The gradient of a weight that lives inside the model at a site; None where another stage has the site."""
    weight, inside = inner_weight(width)
    with tap(model, site, inside, differentiable=True, tensor_parallel=group):
        loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    model.zero_grad()
    return weight.grad


def inner_weight(width: int) -> tuple[Tensor, Edit]:
    """A weight to be trained, and the function that uses it inside a model."""
    weight = torch.eye(width).requires_grad_()

    def inside(_site: str, tensor: Tensor) -> Tensor:
        return (tensor @ weight.to(tensor.dtype)).tanh()

    return weight, inside
