"""One site of one model: its row shape, its dtype, where it is read, and how it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from residua.store.base.errors import CaptureError, PlanError, few
from residua.store.base.naming import named
from residua.store.encoding.codecs import DEFAULT_PRESET, PRESETS
from residua.store.format.plan import SitePlan
from residua.store.format.site_names import Site, parse_site

if TYPE_CHECKING:  # the command line reads `SiteInfo` without torch
    from residua.capture.hooks.own_attention import OwnAttention

FLOATS = ("bfloat16", "float16", "float32", "float64")

Via = Literal["input", "output", "stream", "attention", "logits", "linear", "product", "choice", "softmax", "sum"]
"""How a site is read: a module's input or output; the residual stream that is a module's input and to which its block
adds again later; the attention function that a block calls; the model's logits; the result of a linear map, a
multiplication element by element, a choice of the largest (their indices), a softmax or a sum in a module."""


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One site of one model.

    Attributes:
        name: Canonical text, for example ``resid_post.7``.
        row_shape: Shape of one row, for example ``(width,)`` or ``(heads, head_width)``. An axis that is None has the
            length of the longest example (the key axis of ``pattern``). None if the shape is not known before the
            model has run (a ``module:`` site of a model that takes no token ids).
        dtype: Name of the dtype that the model computes there, for example ``bfloat16``; None if not known.
        module: Dotted path of the module where the site is read; empty for the model itself. For ``attention``, the
            path of the block.
        via: How the site is read there.
        index: Which item of the module's input or output; None means the tensor itself or the first item. For
            calls of torch (``linear``, ``sum``, ...), which of its kind in one forward of the module, from 0.
        per_token: Whether the axes before the row are (batch, positions). Otherwise the site's tensor keeps the axes
            that the module gives it.
        flat: Whether the module has these two axes as one, (batch x positions).
        streams: Whether the module's tensor has an axis of parallel residual streams before these two; it is the first
            axis of the row.
        own: For ``attention`` that a model computes in its own code, where; None if it is read in the interface.
        is_pair: Whether the block computes attention twice from the same queries and keys, and the last axis of the row
            holds what is here in both, side by side.
        factor: What the module's tensor is multiplied by to give the site: what a block adds to the residual stream may
            be a multiple of a module's output.
        problem: Why the site has no rows, as a sentence, where a run of the model has shown it; else empty.
        n_met: How often a run of the model on a few tokens met the site; None if the model did not run.
        note: What a reader of its rows should know, as a sentence without its end; empty for most sites.
    """

    name: str
    row_shape: tuple[int | None, ...] | None
    dtype: str | None
    module: str
    via: Via
    index: int | None = None
    per_token: bool = True
    flat: bool = False
    streams: bool = False
    own: "OwnAttention | None" = None
    is_pair: bool = False
    factor: float = 1.0
    problem: str = ""
    n_met: int | None = field(default=None, compare=False)
    note: str = field(default="", compare=False)

    @cached_property
    def site(self) -> Site:
        """The parsed name."""
        return parse_site(self.name)

    @property
    def where(self) -> str:
        """Where the site is read, for messages: ``model.layers.3.mlp output``."""
        via = {"stream": "input", "linear": "linear map"}.get(self.via, self.via)
        return f"{self.module or 'the model'} {via}" + ("" if self.factor == 1 else f" times {self.factor:.6g}")

    def inside(self, path: str, name: str) -> "SiteInfo":
        """Return the same site of a model that is a part of another one, by its place there.

        Args:
            path: The part's path in the other model; empty if it is the whole.
            name: The site's name there.
        """
        module = ".".join(part for part in (path, self.module) if part)
        own = self.own and replace(self.own, module=".".join(part for part in (path, self.own.module) if part))
        return replace(self, name=name, module=module, own=own)


def site_notes(sites: Mapping[str, SiteInfo]) -> list[str]:
    """Return what a reader of the rows of some sites should know, one sentence for all sites that it is true of."""
    noted: dict[str, list[str]] = {}
    for name, info in sites.items():
        if info.note:
            noted.setdefault(info.note, []).append(name)
    return [f"{few(names)}: {note}" for note, names in noted.items()]


def refuse_repeated(sites: Mapping[str, SiteInfo]) -> None:
    """Raise CaptureError if a forward call meets a site several times: no row has several values."""
    for info in sites.values():
        if (info.n_met or 0) > 1:
            raise CaptureError(info.problem)


def plan_sites(
    sites: Mapping[str, SiteInfo],
    *,
    dtype: str | None,
    codec: str,
    longest_example: int,
    longest_source: int | None = None,
    column_shards: Mapping[str, int] | None = None,
) -> tuple[SitePlan, ...]:
    """Return how each of `sites` is stored.

    Args:
        sites: The sites that `resolve_sites` found.
        dtype: Data type for floating-point sites; None keeps the dtype that the model computes.
        codec: Codec preset for floating-point sites.
        longest_example: Length of the key axis of `pattern` sites.
        longest_source: In a decoder, that of `cross_pattern` sites.
        column_shards: For each site whose rows are stored in column shards, their number.

    Raises:
        CaptureError: A site does not hold one entry for each token, so it has no rows.
    """
    plans = []
    for name, info in sites.items():
        if info.row_shape is None or info.dtype is None or not info.per_token:
            raise CaptureError(
                f"{name} ({info.where}) does not hold one entry for each token, so it has no rows. "
                + (f"{info.problem} " if info.problem else "")
                + "Choose a site that does, or record the calls of your own loop with residua.Recorder, where a row "
                "can be a whole example."
            )
        longest = longest_source if info.site.kind == "cross_pattern" and longest_source else longest_example
        shape = tuple(longest if size is None else size for size in info.row_shape)
        made = plan_site(name, shape, info.dtype, dtype=dtype, codec=codec)
        plans.append(replace(made, column_shards=(column_shards or {}).get(name, 1)))
    return tuple(plans)


def check_storage(
    *,
    codec: str,
    dtype: str | None,
    rows_per_shard: int | None,
    threads: int | None,
) -> None:
    """Check the settings that every capture has for its storage.

    Args:
        codec: Name of a codec preset.
        dtype: Data type to store floating-point sites in; None keeps what the model computes.
        rows_per_shard: Rows of a shard; None leaves the choice to the plan.
        threads: Threads that encode and write; None leaves the choice to the capture.

    Raises:
        PlanError: A setting has a value that nothing can be stored with.
    """
    if codec not in PRESETS:
        raise PlanError(f"{named('codec', codec)} is not known: choose one of {', '.join(PRESETS)}")
    if dtype is not None and dtype not in FLOATS:
        raise PlanError(f"{named('dtype', dtype)} is not known: choose one of {', '.join(FLOATS)}")
    if rows_per_shard is not None and (rows_per_shard < 1 or rows_per_shard & (rows_per_shard - 1)):
        raise PlanError(f"{named('rows_per_shard', rows_per_shard)}: it must be a power of two")
    if threads is not None and threads < 1:
        raise PlanError(f"{named('threads', threads)}: it must be at least 1")


def plan_site(name: str, row_shape: tuple[int, ...], computed: str, *, dtype: str | None, codec: str) -> SitePlan:
    """Return how one site is stored; integer sites keep their data type and are stored without loss."""
    row_shape = row_shape or (1,)
    if computed not in FLOATS:
        exact = codec if codec == "raw" else DEFAULT_PRESET
        return SitePlan(name=name, row_shape=row_shape, dtype=computed, codec=exact)
    return SitePlan(name=name, row_shape=row_shape, dtype=dtype or computed, codec=codec)
