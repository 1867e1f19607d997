"""Whose call says what the rows are: the model's own, or in an encoder-decoder that of the stack which has the sites.

Encoder and decoder have tokens and masks of their own. Sites in the encoder have a row for each token of the source,
all other sites one for each token that the decoder gets, and one archive has rows of one kind.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.store.base.errors import CaptureError, PlanError


def stack_of(model: nn.Module, sites: Mapping[str, SiteInfo]) -> nn.Module | None:
    """Return the encoder or the decoder if `model` has both, whichever has the sites; None for any other model.

    Raises:
        PlanError: Some sites lie in the encoder and some do not.
    """
    core = core_of(model)
    if not isinstance(core, PreTrainedModel) or not getattr(core.config, "is_encoder_decoder", False):
        return None
    encoder, decoder = (_part(get) for get in (core.get_encoder, core.get_decoder))
    if encoder is core or decoder is core or encoder is None or decoder is None:
        raise PlanError(
            f"{type(core).__name__} is an encoder-decoder whose encoder and decoder are not found, so it is not clear "
            "which tokens rows belong to: record one of the two as a model of its own"
        )
    modules = named_modules(model)
    path = next((path for path, module in modules.items() if core_of(module) is core_of(encoder)), None)
    inside = [name for name, info in sites.items() if path is not None and f"{info.module}.".startswith(f"{path}.")]
    outside = [name for name in sites if name not in inside]
    if inside and outside:
        raise PlanError(
            f"{inside[0]} lies in the encoder of {type(core).__name__} and {outside[0]} does not: their rows belong to "
            "other tokens, so one archive cannot have both. Record them with two recorders, into two archives."
        )
    stack: nn.Module = encoder if inside else decoder
    return stack


def _part(get: Any) -> nn.Module | None:
    try:
        found = get()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def refuse_encoder_outputs(model: nn.Module, stack: nn.Module) -> None:
    """Raise CaptureError if `stack` is the encoder: a call that is given its outputs does not run it."""
    core = core_of(model)
    if isinstance(core, PreTrainedModel) and core.get_encoder() is stack:
        raise CaptureError(
            "the call has encoder_outputs, so the encoder does not run, and the recorded sites lie in it: leave "
            "encoder_outputs out"
        )


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module's forward, wrappers apart, in order."""
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = signature(core_of(module).forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in variadic]


@contextmanager
def refusing_generation(model: nn.Module) -> Iterator[None]:
    """Let ``generate`` of a model raise CaptureError inside, before the model runs."""

    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise CaptureError(
            "generate was called inside a recorder: each of its steps sees one new token and a cache, so rows would "
            "get positions that they do not have. Generate first, outside the recorder; then call the model on the "
            "full sequences inside."
        )

    with ExitStack() as stack:
        for one in {id(one): one for one in (model, core_of(model))}.values():
            if callable(getattr(one, "generate", None)):
                attributes = vars(one)
                stack.callback(_restore, attributes, attributes.get("generate"))
                attributes["generate"] = refuse
        yield


def _restore(attributes: dict[str, Any], generate: Any) -> None:
    if generate is None:
        del attributes["generate"]
    else:
        attributes["generate"] = generate
