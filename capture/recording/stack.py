"""Whose call says what the rows are: the model's own, or in an encoder-decoder that of the stack which has the sites.

Encoder and decoder have tokens and masks of their own. Sites in the encoder, and keys and values of cross-attention,
have a row for each token of the source, all other sites one for each token that the decoder gets. One recorder makes
one archive, which has rows of one kind.
"""

from collections.abc import Mapping
from inspect import Parameter, signature

from torch import nn

from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.stacks import is_encoder_decoder, row_stack, stacks_of
from residua.store.base.errors import CaptureError, PlanError


def stack_of(model: nn.Module, sites: Mapping[str, SiteInfo]) -> nn.Module | None:
    """Return the encoder or the decoder if `model` has both, whichever has the rows; None for any other model.

    Raises:
        PlanError: Some sites have rows of the encoder's positions and some of the decoder's.
    """
    if not is_encoder_decoder(model):
        return None
    stacks, name = {stack.name: stack for stack in stacks_of(model)}, type(core_of(model)).__name__
    if not stacks:
        raise PlanError(
            f"{name} is an encoder-decoder whose encoder and decoder are not found, so it is not clear which tokens "
            "rows belong to: record one of the two as a model of its own"
        )
    of_encoder = [site for site, info in sites.items() if row_stack(info, stacks["encoder"]) == "encoder"]
    others = [site for site in sites if site not in of_encoder]
    if of_encoder and others:
        raise PlanError(
            f"{of_encoder[0]} of {name} has a row for each position of the encoder, and {others[0]} one for each of "
            "the decoder: one recorder cannot have both. Record them with two recorders, into two archives, or give a "
            "dataset of pairs to residua.capture_dataset."
        )
    return stacks["encoder" if of_encoder else "decoder"].module


def refuse_encoder_outputs(model: nn.Module, stack: nn.Module) -> None:
    """Raise CaptureError if `stack` is the encoder: a call that is given its outputs does not run it."""
    if any(one.name == "encoder" and one.module is stack for one in stacks_of(model)):
        raise CaptureError(
            "the call has encoder_outputs, so the encoder does not run, and the recorded sites lie in it: leave "
            "encoder_outputs out"
        )


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module's forward, wrappers apart, in order."""
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = signature(core_of(module).forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in variadic]
