"""The plan: the frozen answer, made before the model runs, to everything that decides what is stored where.

All shapes, all row numbers and the content of every batch follow from the plan and the example table alone. The plan's
digest names the run: two captures with equal digests hold the same rows in the same places. Paths and host names are
not part of the plan (they are provenance), so an archive may be moved and resumed elsewhere.

The heights of chunks and shards follow one rule. A chunk is the power of two of rows nearest 512 KiB. All sites share
one shard height, the power of two of rows nearest 32 MiB of the widest site, with corrections in this order:

1. A capture that begins before its dataset is read waits for the examples of a shard: it shrinks until they are few.
2. A shard should hold a full batch, because batches are formed from the examples of one shard: it grows until it does.
3. The host buffers must fit the memory budget: it shrinks until they do. One buffer holds one shard of every site, and
   `n_open_shards` of them are open at once: the shard that fills, and those that its last example reaches into.

The rule is a pure function of its arguments, so that a plan made twice is the same plan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import ceil, inf, prod
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from residua.store.base.canonical import Json, differences, digest_of, flatten
from residua.store.base.errors import PlanError, UnsafeArchiveError
from residua.store.base.naming import named
from residua.store.base.untrusted import (
    MAX_COLUMN_SHARDS,
    MAX_ROWS,
    MAX_ROWS_PER_SHARD,
    MAX_SHARD_BYTES,
    shape_problem,
    size_problem,
)
from residua.store.encoding.codecs import PRESETS, check_codec
from residua.store.encoding.dtypes import storage_dtype
from residua.store.encoding.spec import ArraySpec
from residua.store.format.row_columns import row_columns_of
from residua.store.format.site_names import parse_site

CHUNK_BYTES = 512 * 1024
SHARD_BYTES = 32 * 1024 * 1024
HOST_MEMORY_BYTES = 4 * 1024**3
COLUMN_BYTES = 16  # of a row in a host buffer: its token, position and example
STACK_RULE = "stack"
"""Entry of a plan's `rules`: the stack whose positions are the rows, in a model that has several."""
REPACKED_RULE = "repacked"
"""Entry of a plan's `rules` of rows that were copied into larger shards: the `archive` that they are from, by its
digest, and the `rows_per_shard` of the capture, which formed batches in its shards."""
REPLAY_RULE = "replay"
"""Entry of a plan's `rules` (digest of what was replayed), and of the provenance (its description)."""
GROW_RULE = "grow"
"""Entry of a plan's `rules`: true if rows were captured while the dataset was read, so that its end was not known."""
_OPTIONAL = "column_shards"  # field of a site that the JSON leaves out where it is 1
_MAPPINGS = ("model", "dataset", "rules")


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One site as it is stored.

    Attributes:
        name: The site's text, for example ``resid_post.7``.
        row_shape: Shape of one row, for example ``(width,)`` or ``(heads, head_width)``.
        dtype: The dtype that a reader gets, for example ``bfloat16``.
        codec: Name of the codec, one of ``residua.store.encoding.codecs.PRESETS``.
        column_shards: Into how many shards of equal width the first axis of a row is cut.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    codec: str
    column_shards: int = 1

    @property
    def path(self) -> str:
        """The site's node inside the archive."""
        return parse_site(self.name).path

    @property
    def row_bytes(self) -> int:
        """Logical bytes of one row."""
        return prod(self.row_shape) * storage_dtype(self.dtype).itemsize

    @property
    def one_column_shard(self) -> "SitePlan":
        """The site as if one column shard were all of it."""
        shape = (self.row_shape[0] // self.column_shards, *self.row_shape[1:])
        return replace(self, row_shape=shape, column_shards=1)

    def arrays(self, rows_per_shard: int) -> tuple[ArraySpec, ...]:
        """Return the stored arrays of this site: one, or codes and scales for the int8 codec."""
        return tuple(
            _array(
                self.path.replace("sites", layout.folder, 1),
                layout.row_shape,
                layout.dtype,
                layout.preset,
                rows_per_shard,
                self.column_shards,
            )
            for layout in PRESETS[self.codec].arrays(self.row_shape, self.dtype)
        )


def _array(
    path: str, row_shape: tuple[int, ...], dtype: str, preset: str, rows_per_shard: int, column_shards: int = 1
) -> ArraySpec:
    row_bytes = prod(row_shape) * storage_dtype(dtype).itemsize // column_shards
    return ArraySpec(
        path=path,
        row_shape=row_shape,
        dtype=dtype,
        preset=preset,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=choose_rows_per_chunk(row_bytes, rows_per_shard),
        column_shards=column_shards,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """See the module's head.

    Attributes:
        model: Digests of weights and config, compute dtype, attention implementation.
        dataset: Digest and counts of the example table; empty when the examples are not known beforehand.
        rules: The settings that turned the dataset into examples and kept positions.
        sites: What is stored of every row.
        rows_per_shard: Height of a shard in rows, the same in every array.
        batch_tokens: Most token positions, padding included, in one batch.
        padding: ``left`` or ``right``.
        n_rows: Rows of the archive; None when they are not known beforehand (a loop that the user owns).
    """

    model: Mapping[str, Json]
    dataset: Mapping[str, Json]
    rules: Mapping[str, Json]
    sites: tuple[SitePlan, ...]
    rows_per_shard: int
    batch_tokens: int = 0
    padding: Literal["left", "right"] = "right"
    n_rows: int | None = None

    def __post_init__(self) -> None:
        _check_plan(self)

    def __repr__(self) -> str:
        rows = "an open number of rows" if self.n_rows is None else f"{self.n_rows:,} rows"
        return f"<Plan {self.digest[:12]}: {len(self.sites)} sites, {rows} in shards of {self.rows_per_shard:,}>"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON, in hex: the name of the run."""
        return digest_of(self.to_json())

    @property
    def group_rows(self) -> int:
        """Rows of a group: the examples whose first rows are in it ran in batches of their own.

        It is the height of a shard, where the capture's shards were not copied into larger ones.
        """
        found = self.rules.get(REPACKED_RULE)
        return self.rows_per_shard if found is None else cast("dict[str, int]", found)["rows_per_shard"]

    @property
    def is_replay(self) -> bool:
        """Whether the rows were captured during a replay: they follow from stored rows and edits."""
        return REPLAY_RULE in self.rules

    @property
    def row_columns(self) -> dict[str, str]:
        """The columns of the rows, from name to data type."""
        return row_columns_of(self.dataset)

    @property
    def row_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that say what each row is: token, position and example, and its place in an image."""
        return tuple(
            _array(f"rows/{name}", (), dtype, "fast", self.rows_per_shard) for name, dtype in self.row_columns.items()
        )

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every stored array, sites first."""
        sites = (spec for site in self.sites for spec in site.arrays(self.rows_per_shard))
        return (*sites, *self.row_arrays)

    @cached_property
    def file_keys(self) -> frozenset[str]:
        """The keys of the files of one shard."""
        return frozenset(spec.key for array in self.arrays for spec in array.file_specs)

    def site(self, name: str) -> SitePlan:
        """Return the plan of site `name`; KeyError if the plan has none."""
        return {site.name: site for site in self.sites}[name]

    def shards_of(self, rows: range | npt.NDArray[np.int64]) -> Iterable[int]:
        """Return the shards of `rows`, ascending; a range, which may be huge, is not expanded."""
        height = self.rows_per_shard
        if not isinstance(rows, range):
            return map(int, np.unique(rows // height))
        rows = rows if rows.step > 0 else rows[::-1]
        if rows.step < height:
            return range(rows[0] // height, rows[-1] // height + 1) if rows else ()
        return (row // height for row in rows)

    def n_shards(self, n_rows: int) -> int:
        """Return the number of shards for `n_rows` rows."""
        return -(-n_rows // self.rows_per_shard)

    def to_json(self) -> dict[str, Json]:
        """Return the plan as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: dict(values[name]) for name in _MAPPINGS}
        values["sites"] = [_site_to_json(site) for site in self.sites]
        return values

    def differences(self, other: "Plan") -> list[str]:
        """Return one line for each field in which `other` differs, for the message that refuses it."""
        lines = differences(_comparable(self), _comparable(other), ("the archive", "this run"))
        order, other_order = (", ".join(site.name for site in plan.sites) for plan in (self, other))
        if order != other_order and not lines:
            lines.append(f"sites: the archive has them in the order {order}, this run in the order {other_order}")
        return lines

    @classmethod
    def from_json(cls, value: object) -> "Plan":
        """Return the plan of a JSON value that `to_json` made.

        Raises:
            UnsafeArchiveError: `value` is not such a value; the message says where.
        """
        try:
            found = _fields(value, cls)
            sites = tuple(_site_from_json(site) for site in cast("list[object]", found["sites"]))
            plan = cls(**{**found, "sites": sites})  # type: ignore[arg-type]  # __post_init__ checks the types
            _ = plan.digest  # fails on NaN, broken Unicode and endless nesting, here and not later
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise UnsafeArchiveError(f"the archive's plan is not one that Residua writes: {error}") from error
        return plan


def _fields(value: object, kind: type[Plan] | type[SitePlan]) -> dict[str, object]:
    known = sorted(field.name for field in fields(kind) if field.name != _OPTIONAL)
    if not isinstance(value, dict) or sorted(value) != known:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"expected the fields {known}, found {found}")
    return value


def _site_to_json(site: SitePlan) -> dict[str, Json]:
    values = {**asdict(site), "row_shape": list(site.row_shape)}
    if site.column_shards == 1:
        del values[_OPTIONAL]
    return values


def _site_from_json(value: object) -> SitePlan:
    given = dict(value) if isinstance(value, dict) else {}
    optional = {_OPTIONAL: given.pop(_OPTIONAL)} if _OPTIONAL in given else {}
    found = {**_fields(given or value, SitePlan), **optional}
    row_shape = found["row_shape"]
    if not isinstance(row_shape, list):
        raise TypeError(f"row_shape is {row_shape!r}, not a list")
    if optional == {_OPTIONAL: 1}:
        raise ValueError(f"{_OPTIONAL} is 1, which has to be left out")
    return SitePlan(**{**found, "row_shape": tuple(row_shape)})


def _comparable(plan: Plan) -> dict[str, object]:
    """Return every field by its dotted key, a site as one value."""
    values = flatten(plan.to_json())
    for site in cast("list[dict[str, object]]", values.pop("sites")):
        values[f"sites.{site['name']}"] = {key: value for key, value in site.items() if key != "name"}
    return values


def _check_plan(plan: Plan) -> None:
    """Raise PlanError if `plan` has a value that no archive could be made or safely read with."""
    for name in _MAPPINGS:
        if not isinstance(getattr(plan, name), Mapping):
            raise PlanError(f"the plan's {name} is {getattr(plan, name)!r}, not a mapping")
    _ = plan.row_columns  # raises if there are others
    height = plan.rows_per_shard
    _refuse(size_problem("rows per shard", height, MAX_ROWS_PER_SHARD, 1))
    if height & (height - 1):
        raise PlanError(f"rows per shard: {height:,} is not a power of two")
    _refuse(_repacked_problem(plan.rules.get(REPACKED_RULE), height))
    if plan.n_rows is not None:
        _refuse(size_problem("the plan's number of rows", plan.n_rows, MAX_ROWS))
    _refuse(size_problem("the plan's batch_tokens", plan.batch_tokens, MAX_ROWS))
    if plan.padding not in ("left", "right"):
        raise PlanError(f"the plan's padding is {plan.padding!r}, not left or right")
    names = [site.name for site in plan.sites]
    if not names or len(set(names)) != len(names):
        raise PlanError(f"a plan needs at least one site, and each site once; found {names!r}")
    for site in plan.sites:
        _check_site(site, height)


def _repacked_problem(found: Json, height: int) -> str:
    if found is None:
        return ""
    return size_problem(
        "rows per shard of the capture", found.get("rows_per_shard") if isinstance(found, dict) else None, height, 1
    )


def _check_site(site: SitePlan, height: int) -> None:
    if str(parse_site(site.name)) != site.name:
        raise PlanError(f"site {site.name!r} has to be written {str(parse_site(site.name))!r} in a plan")
    what = f"site {site.name}"
    check_codec(site.codec, site.dtype, what)
    _refuse(shape_problem(f"{what}: shape of a row", site.row_shape, max_rank=4, most=2**31, least=1))
    if site.row_bytes * height > MAX_SHARD_BYTES:
        raise PlanError(f"{what}: a shard of {height:,} rows of {site.row_bytes:,} bytes is over 64 GiB")
    n = site.column_shards
    _refuse(size_problem(f"{what}: column shards", n, MAX_COLUMN_SHARDS, 1))
    if site.row_shape[0] % n:
        raise PlanError(f"{what}: rows of shape {site.row_shape} cannot be cut into {n} column shards of equal width")
    if n > 1 and len(site.arrays(height)) > 1:
        raise PlanError(f"{what}: codec {site.codec} takes full rows, and these are cut into {n} column shards")


def _refuse(problem: str) -> None:
    if problem:
        raise PlanError(problem)


def nearest_power_of_two(value: float) -> int:
    """Return the power of two nearest to `value` on a linear scale, at least 1."""
    lower = 1 << max(0, int(value).bit_length() - 1)
    return lower if value - lower <= 2 * lower - value else 2 * lower


def choose_rows_per_chunk(row_bytes: int, rows_per_shard: int) -> int:
    """Return the chunk height for rows of `row_bytes`, never more than the shard's."""
    return min(rows_per_shard, nearest_power_of_two(CHUNK_BYTES / max(1, row_bytes)))


def n_open_shards(most_rows_per_example: int, rows_per_shard: int) -> int:
    """Return the number of shards open at once: the one that fills and those that its last example reaches into."""
    return 1 + max(1, ceil(most_rows_per_example / rows_per_shard))


def host_buffer_bytes(row_bytes_all: int, most_rows_per_example: int, rows_per_shard: int) -> int:
    """Return the host memory that all buffers take together, in bytes."""
    return n_open_shards(most_rows_per_example, rows_per_shard) * rows_per_shard * (row_bytes_all + COLUMN_BYTES)


def choose_rows_per_shard(
    row_bytes: Iterable[int],
    *,
    batch_rows: int,
    most_rows_per_example: int,
    host_memory_bytes: int = HOST_MEMORY_BYTES,
    most_rows: float = inf,
) -> int:
    """Return the shard height in rows, a power of two, by the rule in the module's head.

    Args:
        row_bytes: Logical bytes of one row of each site.
        batch_rows: Rows that one batch may yield.
        most_rows_per_example: Rows of the example that keeps most.
        host_memory_bytes: Memory that all host buffers may take together.
        most_rows: A shard whose examples have to be read soon has no more, unless a batch has.

    Raises:
        PlanError: Even shards of one row do not fit the budget.
    """
    sizes = list(row_bytes)
    height = nearest_power_of_two(SHARD_BYTES / max([1, *sizes]))
    while height > max(1.0, most_rows):
        height //= 2
    while height < batch_rows:
        height *= 2
    while height > 1 and host_buffer_bytes(sum(sizes), most_rows_per_example, height) > host_memory_bytes:
        height //= 2
    check_host_memory(sizes, most_rows_per_example, height, host_memory_bytes)
    return height


def check_host_memory(
    row_bytes: Iterable[int], most_rows_per_example: int, height: int, host_memory_bytes: int
) -> None:
    """Raise PlanError if host buffers of `height` rows take more than `host_memory_bytes` together."""
    sizes = list(row_bytes)
    needed = host_buffer_bytes(sum(sizes), most_rows_per_example, height)
    if needed > host_memory_bytes:
        raise PlanError(
            f"{named('host_memory')} allows {host_memory_bytes:,} bytes, but {len(sizes)} sites in shards of "
            f"{height:,} rows need {needed:,} to buffer the longest example ({most_rows_per_example:,} rows of "
            f"{sum(sizes):,} bytes): raise {named('host_memory')}, lower {named('rows_per_shard')}, keep fewer "
            f"positions, shorten the examples with {named('max_length')} or capture fewer sites."
        )
