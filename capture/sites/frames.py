"""Encoders over the frames of audio, such as Whisper's: how many positions they have, and a run on a few examples.

Such an encoder takes features of a fixed length, (examples, features of a frame, frames), and its convolutions make one
position of a number of frames that its config fixes. A row of it is such a position, and has no token.
"""

from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residua.capture.hooks.forward_call import run_on_few
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.wrappers import core_of

FRAMES = "input_features"
"""Name of the argument in which transformers' encoders take frames."""


def takes_frames(model: nn.Module) -> bool:
    """Return whether a model is an encoder of transformers that reads a fixed number of frames, and no tokens."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or core.main_input_name != FRAMES:
        return False
    known = all(isinstance(getattr(core.config, name, None), int) for name in ("num_mel_bins", "max_source_positions"))
    return known and "decoder_input_ids" not in signature(core.forward).parameters


def n_frame_positions(model: nn.Module) -> int:
    """Return the number of positions of an encoder over frames, which every example has."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not takes_frames(core):
        raise TypeError(f"{type(core).__name__} is no encoder over frames")
    return int(core.config.max_source_positions)


def run_on_frames(model: nn.Module, n_examples: int) -> Tensor | None:
    """Run an encoder over frames on a few examples; see `residua.capture.sites.shape_probe.run_on_tokens`."""
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"{type(core).__name__} is no model of transformers")
    features = few_frames(core, n_examples)
    return run_on_few(model, {FRAMES: features}, f"features of shape {tuple(features.shape)}")


def few_frames(encoder: PreTrainedModel, n_examples: int) -> Tensor:
    """Return features of a few examples, in the type and on the device of an encoder over frames."""
    shape = (n_examples, *frame_shape(encoder))
    features = torch.sin(torch.arange(shape[0] * shape[1] * shape[2]).float()).view(shape)
    return features.to(input_device(encoder), encoder.dtype)


def frame_shape(encoder: PreTrainedModel) -> tuple[int, int]:
    """Return what an encoder takes of an example: features of a frame, and frames.

    The frames are its positions, times the strides of its convolutions.
    """
    n_frames = int(encoder.config.max_source_positions)
    for module in encoder.children():
        if isinstance(module, nn.Conv1d):
            n_frames *= module.stride[0]
    return int(encoder.config.num_mel_bins), n_frames
