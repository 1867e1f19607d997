"""What a replay changed, as tables: one line a token, one line an example, in parts that are durable one by one.

``tokens/part-00003.parquet`` and ``examples/part-00003.parquet`` hold the examples whose first row lies in shard 3 of
the archive. A part is finished when its file of examples is there, which is written last; the parts of a folder, in
order of their names, are one table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.replay.metrics import token_changes
from residua.store.storage.files import write_file

TOKENS, EXAMPLES = "tokens", "examples"
_MEANS = ("kl", "loss", "unedited_loss", "loss_change", "top1_agrees")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One example, edited and not.

    Attributes:
        example: The example.
        edited: Logits of the edited run, (tokens, vocabulary).
        unedited: Those of the run without edits.
    """

    example: ExampleRows
    edited: Tensor
    unedited: Tensor


def token_table(found: Comparison, chosen: Sequence[int]) -> pa.Table:
    """Return one line for each token of an example; columns as docs/replay.md lists them.

    Args:
        found: Both runs.
        chosen: Tokens whose logits are told.
    """
    example, n_tokens = found.example, len(found.example.input_ids)
    row = np.full(n_tokens, -1, np.int64)
    row[example.positions] = example.first_row + np.arange(len(example.positions))
    agrees = _likeliest(found.edited) == _likeliest(found.unedited)
    divergences, losses, unedited_losses = map(_numbers, token_changes(found.unedited, found.edited, example))
    columns = {
        "example": pa.array(np.full(n_tokens, example.example, np.int64)),
        "position": pa.array(np.arange(n_tokens, dtype=np.int32)),
        "row": pa.array(row, mask=row < 0),
        "token": pa.array(example.input_ids.astype(np.int32)),
        "kl": pa.array(divergences),
        "loss": _next(losses),
        "unedited_loss": _next(unedited_losses),
        "loss_change": _next(losses - unedited_losses),
        "top1_agrees": pa.array(agrees),
    }
    for token in chosen:
        edited, unedited = (_numbers(logits[:, token].float()) for logits in (found.edited, found.unedited))
        columns[f"logit_{token}"] = pa.array(edited)
        columns[f"logit_{token}_change"] = pa.array(edited - unedited)
    return pa.table(columns)


def _likeliest(logits_TV: Tensor) -> npt.NDArray[np.int64]:
    if logits_TV.device.type == "cpu" and logits_TV.dtype == torch.float32:
        found: npt.NDArray[np.int64] = logits_TV.numpy().argmax(-1)  # in a tenth of the time of torch's own
        return found
    return logits_TV.argmax(-1).cpu().numpy()


def _numbers(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return values.float().cpu().numpy()


def _next(losses: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> pa.Array:
    """The last token of an example has no next one, so its loss is null."""
    return pa.array([*losses.tolist(), None], pa.float32())


def example_line(tokens: pa.Table) -> dict[str, float | int | None]:
    """Return what one example's tokens come to: means of those that have a value, and the largest KL."""
    wide = [name for name in tokens.column_names if name.endswith("_change") and name.startswith("logit_")]
    line: dict[str, float | int | None] = {"example": tokens["example"][0].as_py(), "n_tokens": tokens.num_rows}
    for name in (*_MEANS, *wide):
        values = tokens[name].drop_null().to_numpy().astype(np.float64)
        line["top1_agreement" if name == "top1_agrees" else name] = float(values.mean()) if len(values) else None
    line["kl_max"] = float(tokens["kl"].to_numpy().max())
    return line


def example_table(lines: Sequence[Mapping[str, float | int | None]]) -> pa.Table:
    """Return the lines of `example_line` as a table."""
    types = {name: pa.int64() if name in ("example", "n_tokens") else pa.float64() for name in lines[0]}
    return pa.Table.from_pylist(list(lines), schema=pa.schema(list(types.items())))


def part_path(folder: Path, table: str, group: int) -> Path:
    """Return the file of a table that the examples of a group go to."""
    return folder / table / f"part-{group:05d}.parquet"


def write_part(folder: Path, group: int, tables: Sequence[pa.Table]) -> None:
    """Write the tables of the tokens of a group's examples, sorted by example, durably."""
    parts = sorted(tables, key=lambda table: table["example"][0].as_py())
    write_table(part_path(folder, TOKENS, group), pa.concat_tables(parts))
    write_table(part_path(folder, EXAMPLES, group), example_table([example_line(part) for part in parts]))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as a Parquet file, durably, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(path, [sink.getvalue().to_pybytes()])


def read_parts(folder: Path, table: str) -> pa.Table:
    """Return the finished parts of a table as one."""
    names = (path.name for path in (folder / EXAMPLES).glob("part-*.parquet"))
    done = sorted(names, key=lambda name: (len(name), name))  # by number, however many there are
    return pa.concat_tables([pq.read_table(folder / table / name) for name in done])
