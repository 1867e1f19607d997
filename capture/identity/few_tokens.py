"""The model, run over a fixed batch of a few tokens or images, to find out or to prove something about it.

A run of a large model is dear, so one run serves all who want to know what the model computes: `FewTokens`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.forward.inputs import forward_kwargs
from residua.capture.hooks.forward_call import trial
from residua.capture.layout.process_layout import spans_processes
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import runnable
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import anatomy_of, takes_pixels
from residua.capture.sites.frames import FRAMES, few_frames, takes_frames
from residua.capture.sites.pixels import few_images, image_arguments
from residua.capture.sites.stacks import stacks_of
from residua.capture.taps.tap import tap
from residua.store.base.errors import CaptureError

N_EXAMPLES, N_POSITIONS = 2, 13
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class FewTokens:
    """What a model computes on a few tokens or images without padding, found out once for all who ask.

    Making one is a collective of all processes that hold the model.

    Args:
        model: The model, with its wrappers, which may gather weights; in a torch pipeline its stage runs.
        head: Also keep what enters the final norm, if the model is in the table and this process holds all of it.

    Attributes:
        output: What the model returned; None if it cannot be run.
        problem: Why it cannot be run; empty if it can.
        seen: The model's tensors at ``final`` and ``logits``, if they were kept.

    Raises:
        CaptureError: There is no memory to run the model.
    """

    def __init__(self, model: nn.Module, *, head: bool = False) -> None:
        self.output: Any = None
        self.problem = ""
        self.seen: dict[str, Tensor] = {}
        core = core_of(model)
        if not isinstance(core, PreTrainedModel) or not (core.main_input_name == "input_ids" or takes_pixels(core)):
            self.problem = "only a model of transformers over tokens or images can be run over a few of them"
            return
        try:
            with trial(model), self._reading(model) if head else nullcontext():
                self.output = run_few_tokens(model)
        except Exception as error:  # noqa: BLE001 - the boundary to the user's model, which need not run on any tokens
            refuse_without_memory(error)
            shown = (str(error).splitlines() or [""])[0]
            self.problem = f"it cannot be run over a few tokens: {type(error).__name__}: {shown}"

    def _reading(self, model: nn.Module) -> AbstractContextManager[object]:
        anatomy = None if spans_processes(core_of(model)) else anatomy_of(model)
        if anatomy is None or anatomy.family is None or anatomy.unembedding is None:
            return nullcontext()
        return tap(model, "final, logits", self.seen.__setitem__)


def run_few_tokens(model: nn.Module) -> Any:
    """Run a transformers model over a few tokens without padding, or a few images, and return its output.

    A collective of all processes that hold it.

    Args:
        model: The model, with its wrappers, which may gather weights; in a torch pipeline its stage runs.
    """
    if takes_pixels(model):
        images = few_images(model, N_EXAMPLES)
        with trial(model):
            return model(**image_arguments(model, images))
    ids = few_tokens(model, N_EXAMPLES * N_POSITIONS).reshape(N_EXAMPLES, N_POSITIONS)
    return run_tokens(model, ids, torch.ones_like(ids))


def few_tokens(model: nn.Module, n: int, *, first: int = 0) -> Tensor:
    """Return `n` token ids of a transformers model, spread over its vocabulary from `first` on, on its device."""
    core = cast("PreTrainedModel", core_of(model))
    ids = torch.arange(n, device=input_device(core)) * 7 + first
    return ids % int(core.config.get_text_config().vocab_size)


def run_tokens(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """Run a transformers model over a batch as a capture does, in a `trial`, and return its output.

    A collective of all processes that hold it; the arguments are those of `forward_kwargs`.
    """
    kwargs = forward_kwargs(runnable(core_of(model)), input_ids, attention_mask)
    encoder = next((stack.module for stack in stacks_of(model) if takes_frames(stack.module)), None)
    frames = {} if encoder is None else {FRAMES: few_frames(encoder, len(input_ids))}
    with trial(model):
        return runnable(model)(**kwargs, **frames)


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a model's output, or else the first tensor of numbers in it; None if there is none."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def refuse_without_memory(error: Exception) -> None:
    """Raise CaptureError if `error` says that there is no memory, which no later run would have either.

    Call this in the handler of errors that only say that something is not known of the model.
    """
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        raise CaptureError(
            f"the model ran out of memory{on_rank()} on {N_EXAMPLES * N_POSITIONS} tokens: "
            f"{(str(error).splitlines() or [''])[0]}. Free memory there, or spread the model over more devices"
        ) from error
