"""Edits as data: changes of sites on selected rows, in a stated order. No torch, no code.

An edit names its kind (``edit``), its sites (``site``) and what its kind needs. Other keys select rows.

| edit | needs | value that replaces a selected row x |
| --- | --- | --- |
| `zero` | | 0 |
| `mean` | | the mean of the archive's rows; `column`: of examples with the same value; `archive`: of another archive |
| `add` | `vector`, `scale` (1) | x + scale * vector |
| `set` | `to`: a vector, a number, or `stored` | that value, or the row in the archive |
| `scale` | `by` | by * x |
| `project_out` | `directions`: a vector, or several | x without its projection onto their span |
| `noise` | `std`, `seed` (0) | x plus Gaussian noise that depends on seed, site, example and position only |
| `swap` | `source`, `align` (start), `archive` | the stored row of another example, where `align` says |
| `lens` | `lens`, a folder or an address | the lens's estimate of the final residual stream, up to its length |
| `overlay` | `overlay`, a folder | the row of the overlay, if it has one |
| `function` | `function` | the result of a Python function; in-process only, and not reproducible |

`residua.store.selection.tokens` has the keys that select rows (`examples`, `positions`, `rows`, `tokens`, `where`) and
elements of a row (`heads`, `channels`). All that are given must hold. Edits of one site apply in the order of the list;
sites come in the model's order.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from residua.store.base.canonical import Json
from residua.store.edits.places import Address, Place
from residua.store.edits.vectors import Vector
from residua.store.selection.grammar import format_slice
from residua.store.selection.tokens import Selection

Align = Literal["start", "end"] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit; the module's docstring has all kinds.

    Attributes:
        sites: Names or patterns of sites, as given.
        chosen: The rows that it changes.
    """

    sites: tuple[str, ...]
    chosen: Selection = field(default_factory=Selection)
    kind: ClassVar[str] = ""

    @property
    def needs_stored_rows(self) -> bool:
        """Whether it takes stored rows, which tokens that the plan left out do not have."""
        return False

    def to_json(self) -> dict[str, Json]:
        """Return the edit as JSON values without defaults; `parse_edits` reads them."""
        found: dict[str, Json] = {"edit": self.kind, "site": list(self.sites)}
        for owner in (self, self.chosen):
            for entry in fields(owner):
                value = getattr(owner, entry.name)
                if entry.name not in ("sites", "chosen") and (entry.default is MISSING or value != entry.default):
                    found[entry.name] = _plain_json(value)
        return found


@dataclass(frozen=True, kw_only=True)
class Zero(Edit):
    """Zero ablation."""

    kind = "zero"


@dataclass(frozen=True, kw_only=True)
class Mean(Edit):
    """Mean ablation."""

    column: str | None = None
    archive: Place | None = None
    kind = "mean"


@dataclass(frozen=True, kw_only=True)
class Add(Edit):
    """Steering."""

    vector: Vector
    scale: float = 1.0
    kind = "add"


@dataclass(frozen=True, kw_only=True)
class Set(Edit):
    """Replacement by a fixed value or by stored rows."""

    to: Vector | float | Literal["stored"]
    kind = "set"

    @property
    def needs_stored_rows(self) -> bool:
        """Whether the value is the stored row."""
        return isinstance(self.to, str)


@dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """Multiplication by a number."""

    by: float
    kind = "scale"


@dataclass(frozen=True, kw_only=True)
class ProjectOut(Edit):
    """Projection that removes a direction or a subspace."""

    directions: Vector
    kind = "project_out"


@dataclass(frozen=True, kw_only=True)
class Noise(Edit):
    """Gaussian noise."""

    std: float
    seed: int = 0
    kind = "noise"


@dataclass(frozen=True, kw_only=True)
class Swap(Edit):
    """Activation patching with another example's rows.

    Attributes:
        source: The example that the rows come from, one for all or one for each edited example.
        align: Equal positions counted from the ``start`` or the ``end``, or pairs (position here, position there).
        archive: The archive that the rows come from, if it is another one.
    """

    source: int | Mapping[int, int]
    align: Align = "start"
    archive: Place | None = None
    kind = "swap"

    @property
    def needs_stored_rows(self) -> bool:
        """Always: the rows come from an archive."""
        return True


@dataclass(frozen=True, kw_only=True)
class Through(Edit):
    """Replacement by a lens's estimate of the final residual stream."""

    lens: Place
    kind = "lens"


@dataclass(frozen=True, kw_only=True)
class FromOverlay(Edit):
    """Replacement by the rows of an overlay."""

    overlay: Path
    kind = "overlay"

    @property
    def needs_stored_rows(self) -> bool:
        """Always: the rows come from an archive."""
        return True


@dataclass(frozen=True, kw_only=True)
class Function(Edit):
    """A Python function of (site, rows), rows being (rows, *row); it returns the same shape and type."""

    function: Callable[[str, Any], Any]
    kind = "function"

    def to_json(self) -> dict[str, Json]:
        """Return the name of the function; the JSON cannot bring it back, and says so."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        module = getattr(self.function, "__module__", "")
        chosen = Edit(sites=self.sites, chosen=self.chosen).to_json()
        return {**chosen, "edit": self.kind, "function": f"{module}.{name}", "reproducible": False}


KINDS: Mapping[str, type[Edit]] = {
    kind.kind: kind for kind in (Zero, Mean, Add, Set, Scale, ProjectOut, Noise, Swap, Through, FromOverlay, Function)
}
"""From the name of a kind to its class."""


def _plain_json(value: Any) -> Json:
    if isinstance(value, Vector):
        return value.to_json()
    if isinstance(value, Path | Address):
        return str(value)
    if isinstance(value, slice):
        return format_slice(value)
    if isinstance(value, tuple):
        return [_plain_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain_json(item) for key, item in value.items()}
    plain: Json = value
    return plain
