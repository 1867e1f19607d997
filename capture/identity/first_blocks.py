"""The first blocks of a model, run in float32 whatever the model's dtype: what they do is told apart from rounding.

The weights of these blocks are copied for the run; the model itself stays as it is, and its upper blocks do not run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from residua.capture.forward.inputs import PaddedBatch, forward_kwargs
from residua.capture.hooks.forward_call import trial
from residua.capture.identity.few_tokens import refuse_without_memory
from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.module_io import output_item
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy, anatomy_of

HALF = (torch.bfloat16, torch.float16)
_N_BLOCKS = 2


class _Ended(Exception):  # noqa: N818  # it ends a run that is not needed any further, and is no error
    """The first blocks have run."""


def first_blocks_in_float32(model: nn.Module, batches: Sequence[PaddedBatch]) -> list[Tensor] | None:
    """Run the first two blocks of a language model in float32 over some batches.

    Args:
        model: The model, with its wrappers, with weights in half precision.
        batches: The batches.

    Returns:
        The residual stream of each batch after these blocks, (batch, positions, width), float32; None if the model does
        not run so: its blocks are not known, or its weights are spread over processes, offloaded or packed.

    Raises:
        CaptureError: There is no memory for it.
    """
    anatomy = None if spans_processes(core_of(model)) or is_sharded(model) else anatomy_of(model)
    if anatomy is None:
        return None
    try:
        weights = _widened(anatomy)
        return None if weights is None else [_run(anatomy, weights, batch) for batch in batches]
    except Exception as error:  # noqa: BLE001 - the boundary to the user's model, which need not run in float32
        refuse_without_memory(error)
        return None


def _lower_modules(anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
    """Return the modules that run before the third block, with their names; without the LM head."""
    above = {id(part) for block in anatomy.blocks[_N_BLOCKS:] for part in anatomy.modules[block].modules()}
    above.add(id(anatomy.model.get_output_embeddings()))  # type: ignore[no-untyped-call]  # transformers has no types
    return [(name, module) for name, module in anatomy.model.named_modules() if id(module) not in above]


def _widened(anatomy: Anatomy) -> dict[str, Tensor] | None:
    """Return weights and buffers of the lower modules in float32, by name; None if some are on no device.

    Embeddings are left out, since they can be large: what they give is widened.
    """
    halves = {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in _lower_modules(anatomy)
        if not isinstance(module, nn.Embedding)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensor.dtype in HALF
    }
    if any(tensor.is_meta for tensor in halves.values()):
        return None
    return {name: tensor.detach().float() for name, tensor in halves.items()}


def _run(anatomy: Anatomy, weights: dict[str, Tensor], batch: PaddedBatch) -> Tensor:
    core, found = anatomy.model, list[Tensor]()

    def end(_module: nn.Module, _args: object, output: object) -> None:
        found.append(output_item(output, None, "a block"))
        raise _Ended

    kwargs = forward_kwargs(core, batch.input_ids, batch.attention_mask)
    with trial(core), _hooked(anatomy, end):
        try:
            functional_call(core, weights, (), kwargs)
        except _Ended:
            return found[0]
    raise RuntimeError("the model did not run its blocks")


@contextmanager
def _hooked(anatomy: Anatomy, end: Callable[[nn.Module, object, object], None]) -> Iterator[None]:
    """Widen what embeddings give, and call `end` after the last of the lower blocks."""
    last = anatomy.modules[anatomy.blocks[:_N_BLOCKS][-1]]
    embeddings = [module for _, module in _lower_modules(anatomy) if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(lambda _m, _a, output: output.float()) for module in embeddings]
    handles.append(last.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
