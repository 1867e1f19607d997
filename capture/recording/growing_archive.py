"""An archive that grows with the calls of a loop: its writer, its example table and the next free row.

Where several processes hold the model together, each has one of these. The first of them makes the archive, keeps the
example table and seals; each stores its share of every shard, as in `residua.capture.recording.record`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.buffers.row_index import batch_rows
from residua.capture.identity.provenance import describe_model, environment
from residua.capture.identity.sidecars import save_tokenizer, write_sidecars
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards, full_row_shape
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.layout.row_exchange import RowExchange
from residua.capture.recording.call import Call, Column, example_rows
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.devices import runs_on_cuda
from residua.capture.scheduling.membership import Membership
from residua.capture.scheduling.ownership import Ownership
from residua.capture.scheduling.worker_group import GroupCommits
from residua.store.base.canonical import Json
from residua.store.base.errors import CaptureError
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import file_digest
from residua.store.format.create import create_archive, seal, workspace
from residua.store.format.plan import Plan, n_open_shards
from residua.store.format.writer import ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.crc import Buffer

_LOG = logging.getLogger(__name__)


class GrowingArchive:
    """Takes the rows of call after call; see the module's head.

    Args:
        path: Folder of the new archive.
        model: The model, for the provenance.
        plan: What is stored, without a number of rows.
        files: What lies in the archive's ``head`` folder, by name.
        tokenizer: Stored beside them.
        parts: Finds out how the sites lie over the processes that hold the model.
        worker_group: Those processes and this one's part of the model; None if it has all of it.
        first_rows: Rows of the first call.
        host_memory: Memory that host buffers may take together, in bytes.
        threads: Encoder threads.

    Raises:
        FileExistsError: `path` exists.
        CaptureError: The first of the processes could not make the archive, or made another than this one would.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        plan: Plan,
        *,
        files: Mapping[str, Sequence[Buffer]],
        tokenizer: PreTrainedTokenizerBase | None,
        parts: LocalShards,
        worker_group: tuple[Membership, ProcessLayout] | None,
        first_rows: int,
        host_memory: int,
        threads: int,
    ) -> None:
        self._path = path
        self._plan = plan
        self._membership = None if worker_group is None else worker_group[0]
        part = None if worker_group is None else worker_group[1]

        def make() -> Mapping[str, Json]:
            with workspace(path) as folder:
                write_sidecars(folder, files)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, folder / "tokenizer")
                create_archive(folder, path, plan, {"model": describe_model(model, plan.model), **environment()})
            return {"plan": plan.digest}

        try:
            made = make() if self._membership is None else self._membership.once("archive", make)
        except (FileExistsError, BlockingIOError) as error:
            raise type(error)(error.errno, taken(error.strerror or str(error))) from error
        if made["plan"] != plan.digest:
            listed = "; ".join(Archive(path).plan.differences(plan))
            raise CaptureError(
                f"the recorder{on_rank()} is another than on the first rank that holds the model: {listed}. Make the "
                "same one on all of them."
            )
        self._examples = (
            ExampleWriter(path / "examples") if self._membership is None or not self._membership.number else None
        )
        self._commits = None if part is None else GroupCommits(part.worker_group, plan)
        self._writer = ShardWriter(
            path, plan, threads=threads, report=None if self._commits is None else self._commits.report
        )
        ownership = Ownership(plan.sites) if part is None else part.ownership(plan)
        self._filler = ShardFiller(
            plan,
            self._writer,
            n_buffers=n_open_shards(first_rows, plan.rows_per_shard),
            max_buffers=host_memory // (plan.rows_per_shard * sum(site.row_bytes for site in plan.sites)),
            pinned=runs_on_cuda(model),
            ownership=ownership,
        )
        self._sink = RowExchange(plan, self._filler, ownership, parts, None if part is None else part.group)
        self._n_rows = 0
        self._n_examples = 0
        self._shape = (0, 0)

    def begin(self, call: Call, keep: npt.NDArray[np.bool_] | None, columns: Mapping[str, Column]) -> None:
        """Number the rows of a call, and find a place for them."""
        examples, padded = call.examples(keep, columns)
        rows = example_rows(examples, padded, self._n_examples, self._n_rows)
        if self._examples is not None:
            for example in examples:
                self._examples.add(example)
        self._n_examples += len(examples)
        self._n_rows += sum(len(example.positions) for example in examples)
        self._shape = call.shape
        self._sink.begin(batch_rows(rows, call.shape[1]))

    def put(self, site: str, local: Tensor, layout: Layout) -> None:
        """Take this process's part of one site's tensor.

        Raises:
            CaptureError: Its rows have another shape than those of the first call.
        """
        expected, found = self._plan.site(site).row_shape, full_row_shape(site, local, layout, self._shape)
        if found != expected and not site.startswith("pattern."):
            raise CaptureError(
                f"{site} gave rows of shape {found} in this call, and {expected} in the first: the rows of an archive "
                "are alike. Record calls of one shape, or choose another site."
            )
        self._sink.put_shard(site, local, layout)

    def finish(self) -> None:
        """End a call, every site of which was put: full shards go to the writer."""
        self._filler.finish(self._flush_examples)
        if self._commits is not None:
            self._commits.publish(self._writer)

    def _flush_examples(self) -> dict[str, str]:
        part = None if self._examples is None else self._examples.flush()
        return {} if part is None else {part: file_digest(self._path / "examples" / part)}

    def close(self, *, finish: bool) -> None:
        """Write what is full, and, to finish, the last shard and the seal; then all have to call it.

        Raises:
            CaptureError: A shard could not be written, or another process of the replica is gone.
        """
        after_error = True
        try:
            self._close_writer(finish=finish)
            after_error = not finish
        finally:
            if self._commits is not None:
                self._commits.finish(self._writer, after_error=after_error)
        found = {path: count for path, count in self._writer.n_nonfinite.items() if count}
        if found:
            _LOG.warning("NaN or infinite values were recorded, and kept as they are: %s", found)
        if finish and self._membership is None:
            self._seal()
        elif finish and self._membership is not None:
            self._membership.finish(self._seal)

    def _close_writer(self, *, finish: bool) -> None:
        try:
            if finish:
                for shard in self._filler.open_shards:
                    self._filler.hand_over(shard, self._flush_examples())
        finally:
            self._writer.close()

    def _seal(self) -> Mapping[str, Json]:
        if self._examples is None:
            raise RuntimeError("the archive is sealed by who keeps its example table")
        index = self._examples.close()
        archive = Archive(self._path)
        sealed: dict[str, Json] = {"n_rows": self._n_rows, "n_examples": self._n_examples, "examples": index.digest}
        seal(self._path, archive.metadata, archive.commits, sealed)
        return {}


def taken(found: str) -> str:
    """Return what was found at the place of a new archive, with what to do where another replica may have made it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    return (
        f"{found}. Data-parallel replicas record examples of their own, each into an archive of its own: give each "
        "another place, or fill one archive from all of them with residua.capture_dataset"
    )
