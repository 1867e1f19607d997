"""Edits as data: what is changed at which sites, on which rows, in a stated order. No torch, no code.

An edit names its kind (``edit``), its sites (``site``) and what the kind needs; the rest says where it applies:

| edit | needs | what becomes of a chosen row x |
| --- | --- | --- |
| `zero` | | 0 |
| `mean` | | the mean of the archive's rows; `column`: of examples with the same value there; `archive`: of another |
| `add` | `vector`, `scale` (1) | x + scale * vector |
| `set` | `to`: a vector, a number, or `stored` | that value, or the row that the archive holds |
| `scale` | `by` | by * x |
| `project_out` | `directions`: a vector, or several | x without its part in the space that they span |
| `noise` | `std`, `seed` (0) | x plus Gaussian noise that follows from seed, site, example and position alone |
| `swap` | `source`, `align` (start), `archive` | the stored row of another example, at the position that `align` says |
| `lens` | `lens`, a folder | the lens's guess at the final residual stream, up to its length |
| `overlay` | `overlay`, a folder | the overlay's row where it has one |
| `function` | `function` | what a Python function makes of the rows; in-process only, and not reproducible |

`examples`, `positions` (numbers, negative ones from the end, or a slice as text, ``"-3:"``), `rows` (of the archive),
`tokens` (ids) and `where` (values of the dataset's columns) choose rows, and all that are given must hold. `heads` and
`channels` choose parts of a row. Edits of one site apply in the order of the list; sites come in the model's order.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from residua.store.base.canonical import Json
from residua.store.edits.vectors import Vector
from residua.store.selection.grammar import format_slice
from residua.store.selection.tokens import Selection

Align = Literal["start", "end"] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit; see the module's head.

    Attributes:
        sites: Names or patterns of sites, as they were given.
        chosen: Where it applies.
    """

    sites: tuple[str, ...]
    chosen: Selection = field(default_factory=Selection)
    kind: ClassVar[str] = ""

    @property
    def needs_stored_rows(self) -> bool:
        """Whether it takes rows that are stored, so that it has none for tokens that the plan left out."""
        return False

    @property
    def folders(self) -> tuple[Path, ...]:
        """Archives, lenses and overlays that it takes values from."""
        return tuple(value for entry in fields(self) if isinstance(value := getattr(self, entry.name), Path))

    def to_json(self) -> dict[str, Json]:
        """Return the edit as plain JSON values, defaults left out; `parse_edits` reads them."""
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
    archive: Path | None = None
    kind = "mean"


@dataclass(frozen=True, kw_only=True)
class Add(Edit):
    """Steering."""

    vector: Vector
    scale: float = 1.0
    kind = "add"


@dataclass(frozen=True, kw_only=True)
class Set(Edit):
    """A value in place of another."""

    to: Vector | float | Literal["stored"]
    kind = "set"

    @property
    def needs_stored_rows(self) -> bool:
        """Whether the value is the stored row."""
        return isinstance(self.to, str)


@dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """A multiple."""

    by: float
    kind = "scale"


@dataclass(frozen=True, kw_only=True)
class ProjectOut(Edit):
    """Removal of a direction or of a subspace."""

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
        source: The example whose rows come in, for all or by example.
        align: Equal positions counted from the ``start`` or the ``end``, or pairs (position here, position there).
        archive: Where the rows come from, if it is another archive.
    """

    source: int | Mapping[int, int]
    align: Align = "start"
    archive: Path | None = None
    kind = "swap"

    @property
    def needs_stored_rows(self) -> bool:
        """Always: the rows come from an archive."""
        return True


@dataclass(frozen=True, kw_only=True)
class Through(Edit):
    """Decoding through a lens."""

    lens: Path
    kind = "lens"


@dataclass(frozen=True, kw_only=True)
class FromOverlay(Edit):
    """Rows that were edited elsewhere."""

    overlay: Path
    kind = "overlay"

    @property
    def needs_stored_rows(self) -> bool:
        """Always: the rows come from an archive."""
        return True


@dataclass(frozen=True, kw_only=True)
class Function(Edit):
    """A Python function of (site, rows): rows are (rows, *row) and what comes back is of the same shape and type."""

    function: Callable[[str, Any], Any]
    kind = "function"

    def to_json(self) -> dict[str, Json]:
        """Return what can be said of a function: its name, and that nobody can run it from this."""
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
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, slice):
        return format_slice(value)
    if isinstance(value, tuple):
        return [_plain_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain_json(item) for key, item in value.items()}
    plain: Json = value
    return plain
