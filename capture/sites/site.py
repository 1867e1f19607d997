"""What is known of one site of one model: its row, its type, and where it is read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from residua.store.format.site_names import Site, parse_site

Via = Literal["input", "output", "stream", "attention", "logits"]
"""How a site is reached: what a module takes or gives; the residual stream that a module takes and its block
adds to again later; the attention function that a block calls; the model's logits."""


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One site of one model.

    Attributes:
        name: Canonical text, for example ``resid_post.7``.
        row_shape: Shape of one row, for example ``(width,)`` or ``(heads, head_width)``. None in it stands
            for the length of the longest example (the key axis of ``pattern``). None instead of it: not
            known before the model has run (a ``module:`` site of a model that takes no token ids).
        dtype: Name of the model's own type there, for example ``bfloat16``; None: not known either.
        module: Dotted path of the module where it is read; empty for the model itself. For ``attention``,
            the block whose attention it is.
        via: How it is reached there.
        index: Which item of what the module takes or gives; None means the tensor or the first item.
        per_token: Whether the axes in front of the row are (batch, positions); otherwise the tensor is
            passed on as the module made it.
        flat: Whether the module has those two axes as one, (batch x positions).
    """

    name: str
    row_shape: tuple[int | None, ...] | None
    dtype: str | None
    module: str
    via: Via
    index: int | None = None
    per_token: bool = True
    flat: bool = False

    @cached_property
    def site(self) -> Site:
        """The parsed name."""
        return parse_site(self.name)

    @property
    def where(self) -> str:
        """Where the site is read, for people: ``model.layers.3.mlp output``."""
        via = "input" if self.via == "stream" else self.via
        return f"{self.module or 'the model'} {via}"
