"""Pre-hooks and backward pre-hooks on distributed models: read and replace module inputs and their gradients.

Both ranks of a launch run these checks. FlexModel has such hooks, and does not test them on several ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residua.capture.taps.tap import TapGroup, tap
from tests.distributed.checks.refusals import Load, alone
from tests.distributed.layouts.case import relative_error
from tests.distributed.layouts.single_process import batch, loss_of, vector
from tests.models.tiny import SPLIT

INPUTS = "module:model.layers.1.mlp@input,module:model.layers.1.mlp.down_proj@input,resid_pre.2,mlp_act.0,z.1"
BOUND = 2e-5


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch(0)).logits
    return logits


def bare() -> nn.Module:
    """The model on one process: the group of this rank alone keeps taps from looking for others."""
    return SPLIT["llama"]()


def check(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """What the owner got is what one process gets, and nobody else got anything."""
    assert got.keys() == (wanted.keys() if dist.get_rank() == 0 else set())
    assert {site: error for site in got if (error := relative_error(got[site], wanted[site])) > BOUND} == {}


def inputs_of_modules(load: Load) -> None:
    """Inputs, whole and split ones, and the logits after a change of each."""
    model, single, group = load(), bare(), alone()
    got, wanted = dict[str, Tensor](), dict[str, Tensor]()
    with tap(model, INPUTS, got.__setitem__):
        logits_of(model)
    with tap(single, INPUTS, wanted.__setitem__, tensor_parallel=group):
        plain = logits_of(single)
    check(got, wanted)
    for site in INPUTS.split(","):
        with tap(model, site, added):
            changed = logits_of(model)
        with tap(single, site, added, tensor_parallel=group):
            expected = logits_of(single)
        assert relative_error(changed, expected) < BOUND
        assert relative_error(plain, expected) > 100 * BOUND, f"{site} changes nothing: no test"


def added(_site: str, tensor: Tensor) -> Tensor:
    return tensor + vector(tensor.shape[-1])


def gradients_of_inputs(load: Load) -> None:
    """Gradients by inputs; and what flows on to the embedding once one of them is replaced, or is not any more."""
    model, single, alone_ = load(), bare(), alone()
    switch = TapGroup()

    def embedding_gradient(
        of: nn.Module, site: str, change: Callable[[str, Tensor], Tensor], ranks: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        with (
            tap(of, site, change, backward=True, tensor_parallel=ranks, group=switch),
            tap(of, f"embed,{INPUTS}", kept.__setitem__, backward=True, tensor_parallel=ranks),
        ):
            loss_of(of, batch(0)).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        of.zero_grad()
        return kept

    for site in INPUTS.split(","):
        wanted = embedding_gradient(single, site, negated, alone_)
        check(embedding_gradient(model, site, negated, None), wanted)
        with switch.off():
            plain = embedding_gradient(single, site, negated, alone_)
            check(embedding_gradient(model, site, negated, None), plain)
        assert relative_error(wanted["embed"], plain["embed"]) > 100 * BOUND, f"{site} changes nothing: no test"


def negated(_site: str, gradient: Tensor) -> Tensor:
    return -2 * gradient


CHECKS = (inputs_of_modules, gradients_of_inputs)
