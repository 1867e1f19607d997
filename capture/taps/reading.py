"""Read and replace the tensors of chosen sites during the forward pass of a model in one process.

Recording is built on `reading`: a callback gets each site's tensor, with the same axes in every architecture, and may
return a replacement.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from residua.capture.hooks.attention import eager_where_needed
from residua.capture.hooks.forward_call import ForwardCall
from residua.capture.hooks.hooks import attached, values_of
from residua.capture.hooks.site import SiteInfo, refuse_repeated
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.shape_probe import not_once
from residua.store.base.errors import CaptureError

TapFunction = Callable[[str, Tensor], Tensor | None]
"""Takes a site's name and its tensor; the result replaces the tensor unless it is None."""


def and_more(sites: Sequence[object]) -> str:
    """Return the end of a message about the first of some sites: how many others it is true of."""
    return f" The same holds for {len(sites) - 1} more sites." if len(sites) > 1 else ""


class Taps:
    """The sites that are read, and the check that a forward call met all of them.

    Args:
        model: Any torch module; the very object that will be called.
        sites: The result of `resolve_sites`.
        function: As for `reading`.

    Raises:
        CaptureError: A forward call meets one of the sites several times.

    Attributes:
        sites: From name to what is known of each site.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, SiteInfo], function: TapFunction) -> None:
        refuse_repeated(sites)
        self.sites = dict(sites)
        self._model = model
        self._function = function
        self._fired = dict.fromkeys(self.sites, 0)
        self._call = ForwardCall()
        self._n_counted = 0
        self._top: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Read sites inside. Changes made by hooks registered earlier are visible; later ones are not."""
        with ExitStack() as stack:
            stack.enter_context(eager_where_needed(self._model, self.sites.values()))
            modules = target_of(self._model).modules
            # a pre-hook of a wrapper runs before the model inside is called, any other one after the call is counted
            self._n_counted = int(modules[""] is self._model)
            self._call = stack.enter_context(attached(modules, self.sites.values(), values_of(self._emit)))
            yield

    def begin_forward(self) -> None:
        """Forget calls that failed, and read after all other hooks and taps, also after those attached later.

        Call this from a pre-hook of the model, if its loop may go on after a call that failed.
        """
        self._fired = dict.fromkeys(self.sites, 0)
        self._call.n_calls = self._n_counted
        self._top.clear()
        self._call.move_last()

    def end_forward(self) -> None:
        """Check that there was one forward call since the last check, and that it met every site exactly once.

        Call this after each forward call of the model. It starts a new count.

        Raises:
            CaptureError: The model was not called once, or a site was not met once; the message names the sites.
        """
        fired, self._fired = self._fired, dict.fromkeys(self.sites, 0)
        n_calls, self._call.n_calls = self._call.n_calls, 0
        self._top.clear()
        if n_calls != 1:
            raise CaptureError(
                f"The model's forward was called {n_calls} times since the last check instead of once. Call the very "
                "model that is read, and check after each call. A compiled model ignores hooks that are attached "
                "later: attach first, then compile."
            )
        wrong = [not_once(self.sites[name], count) for name, count in fired.items() if count != 1]
        if wrong:
            raise CaptureError(wrong[0] + and_more(wrong))

    def _emit(self, info: SiteInfo, tensor: Tensor) -> Tensor | None:
        self._fired[info.name] += 1
        if info.site.top is None:
            return self._function(info.name, tensor)
        if self._function(info.name, self._top_logits(info, tensor)) is not None:
            raise CaptureError(f"Site {info.name!r} cannot be replaced; replace 'logits' instead.")
        return None

    def _top_logits(self, info: SiteInfo, logits_BTV: Tensor) -> Tensor:
        """Return values or int32 indices of the largest logits; one search gives both halves."""
        n_top, half = info.site.top or 0, info.site.field or "values"
        if half not in self._top.get(n_top, {}):
            values_BTK, indices_BTK = logits_BTV.topk(n_top, dim=-1)
            self._top[n_top] = {"values": values_BTK, "indices": indices_BTK.to(torch.int32)}
        return self._top[n_top].pop(half)


@contextmanager
def reading(
    model: nn.Module, sites: Mapping[str, SiteInfo] | Iterable[str] | str, function: TapFunction
) -> Iterator[Taps]:
    """Call ``function`` with each site's tensor while the model runs.

    The tensor has shape (batch, positions, *row): (batch, positions, heads, head width) for ``q``, ``k``, ``v`` and
    ``z``, (batch, query positions, heads, key positions) for ``pattern``. A site whose ``per_token`` is false has the
    shape that its module gave it. The tensor is detached, on the model's device and in the model's dtype. It is not
    copied, and the model may change it later: copy what you keep before you return, and do not write into it.

    A tensor that the function returns replaces the site's value in the model. Gradients flow into the replacement, but
    not into the detached tensor. Reading a ``pattern`` switches all layers to eager attention.

    Leaving the context, also by an exception, removes exactly what was added here.

    Args:
        model: Any torch module; the very object that will be called.
        sites: Names or patterns of sites, or the result of `resolve_sites`. For names, ``module:`` sites of a language
            model are measured first, by running the model on a few tokens.
        function: Called as ``function(name, tensor)`` during the forward pass.

    Yields:
        The sites that are read, and the check to make after each forward call.

    Raises:
        UnknownSiteError: The model has no such site.
        CaptureError: A forward call meets a site several times; or, during the model's forward pass, a replacement
            does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> with reading(model, "module:0", lambda name, tensor: print(name, tuple(tensor.shape))) as taps:
        ...     _ = model(torch.ones(4, 2))
        ...     taps.end_forward()
        module:0@output (4, 3)
    """
    taps = Taps(model, sites if isinstance(sites, Mapping) else resolve_sites(model, sites), function)
    with taps.attached():
        yield taps
