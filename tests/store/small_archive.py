"""A small sealed archive with every kind of file, and everything that a reader can get from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from residua.store.base.canonical import Json
from residua.store.base.errors import ResiduaError
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.sidecars import LM_HEAD_FILE, PARAMETERS_FILE, LMHeadSpec
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.read.array import ArchiveArray
from residua.store.sealing.seal import seal
from residua.store.storage.files import write_file

HEIGHT = 16
LENGTHS = (20, 1, 12, 5)
N_ROWS = sum(LENGTHS)
N_SHARDS = 3
TEXT_ROWS = (0, 19, 20, 37)


def make_archive(
    path: Path,
    codec: str = "fast",
    *,
    seed: int = 0,
    open_size: bool = False,
    stack: str = "",
    cross: bool = False,
    nonfinite: bool = False,
    sites: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """Write an archive of three shards, the last one short, at `path`; `seed` changes its values.

    With `sites`, it has only these, with the same values. With `open_size`, its size is not known before it is
    sealed. With `stack`, its sites are of that stack; with `cross`, it also has keys of the decoder's
    attention to its rows. With `nonfinite`, every shard of every site has a NaN. Further
    options are those of its `ExampleWriter`.
    """
    rng, dot = np.random.default_rng(seed), stack and f"{stack}."
    all_sites: tuple[SitePlan, ...] = (
        SitePlan(name=f"{dot}resid_post.0", row_shape=(40,), dtype="float32", codec=codec),
        SitePlan(name=f"{dot}q.1", row_shape=(2, 4), dtype="float32", codec=codec),
    )
    if cross:
        all_sites = (*all_sites, SitePlan(name="decoder.cross_k.1", row_shape=(2, 4), dtype="float32", codec=codec))
    with workspace(path) as folder:
        examples = [_example(i, length, rng) for i, length in enumerate(LENGTHS)]
        writer = ExampleWriter(folder / "examples", **options)
        for example in examples:
            writer.add(example)
        index = writer.close()
        _write_sidecars(folder, rng)
        plan = Plan(
            model={"weights": f"{seed}"},
            dataset={"digest": index.digest, "n_examples": len(LENGTHS)},
            rules={"positions": "all"},
            sites=tuple(site for site in all_sites if not sites or site.name in sites),
            rows_per_shard=HEIGHT,
            batch_tokens=0 if open_size else 64,
            n_rows=None if open_size else N_ROWS,
        )
        create_archive(folder, path, plan, {"command": "none"})
    values = {site.name: rng.standard_normal((N_ROWS, *site.row_shape), np.float32) for site in all_sites}
    for rows in values.values():
        rows.reshape(N_ROWS, -1)[:: HEIGHT // 2, 0] = (
            np.nan if nonfinite else rows.reshape(N_ROWS, -1)[:: HEIGHT // 2, 0]
        )
    columns = {
        "token": np.concatenate([example.input_ids for example in examples]),
        "position": np.concatenate([example.positions for example in examples]),
        "example": np.repeat(np.arange(len(LENGTHS)), LENGTHS),
    }
    _write_shards(path, plan, {site.name: values[site.name] for site in plan.sites}, columns)
    archive = Archive(path)
    sealed: dict[str, Json] = {"n_rows": N_ROWS, "n_examples": len(LENGTHS), "examples": index.digest}
    seal(path, archive.metadata, sealed if open_size else None)
    return path


def _example(i: int, length: int, rng: np.random.Generator) -> Example:
    ids = rng.integers(0, 50, length, dtype=np.int32)
    columns = {"label": f"example {i}", "score": i / 7, "count": i * 1000}
    return Example(input_ids=ids, positions=np.arange(length, dtype=np.int32), columns=columns)


def _write_sidecars(folder: Path, rng: np.random.Generator) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))  # noqa: S106  # no password
    write_file(folder / "tokenizer" / "tokenizer.json", [tokenizer.to_str().encode()])
    head = save({"unembed.weight": rng.standard_normal((5, 4), np.float32)})
    write_file(folder / "head" / PARAMETERS_FILE, [head])
    write_file(folder / "head" / LM_HEAD_FILE, [LMHeadSpec(norm="none", dtype="float32").to_json()])


def _write_shards(path: Path, plan: Plan, values: dict[str, Any], columns: dict[str, Any]) -> None:
    with ShardWriter(path, plan) as writer:
        for shard, first in enumerate(range(0, N_ROWS, HEIGHT)):
            rows = slice(first, min(first + HEIGHT, N_ROWS))
            writer.submit(
                FilledShard(
                    index=shard,
                    first_row=first,
                    sites={name: array[rows] for name, array in values.items()},
                    columns={name: np.ascontiguousarray(column[rows]) for name, column in columns.items()},
                )
            )


def read_everything(path: Path) -> dict[str, object]:
    """Return everything that a reader can get from the archive, by name; an error of ours in its place.

    Other errors are raised.
    """
    archive = _try(Archive, path)
    if not isinstance(archive, Archive):
        return {"open": archive}
    found: dict[str, object] = {
        "plan": archive.plan.digest,
        "provenance": archive.provenance,
        "rows": _try(getattr, archive, "n_rows"),
        "progress": _try(getattr, archive, "progress"),
        "examples": _try(_table, archive),
    }
    for name in archive.sites:
        found[name] = _try(_bits, archive[name], slice(None))
        found[f"{name} backwards"] = _try(_bits, archive[name], slice(None, None, -1))
    for column, array in archive.rows._asdict().items():
        if array is not None:
            found[column] = _try(_bits, array, slice(None))
    for example in range(len(LENGTHS)):
        found[f"example {example}"] = _try(_example_bits, archive, example)
    for row in TEXT_ROWS:
        found[f"text {row}"] = _try(archive.text, row)
    return found


def _try(read: Callable[..., object], *arguments: object) -> object:
    try:
        return read(*arguments)
    except (ResiduaError, FileNotFoundError) as error:
        return error


def _table(archive: Archive) -> object:
    return archive.examples.to_pydict()


def _bits(array: ArchiveArray, rows: slice) -> tuple[str, tuple[int, ...], bytes]:
    found = array[rows]
    return str(found.dtype), found.shape, found.tobytes()


def _example_bits(archive: Archive, example: int) -> dict[str, bytes]:
    return {name: rows.tobytes() for name, rows in archive.example(example).items()}


def files_of(archive: Path) -> list[str]:
    """Return the path of every file inside the archive, sorted."""
    return sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file())


def is_same_json(first: bytes, second: bytes) -> bool:
    """Say whether two texts are JSON with the same content, as ``1e-6`` and ``1E-6`` are."""
    try:
        return bool(json.loads(first) == json.loads(second))
    except (ValueError, RecursionError):
        return False
