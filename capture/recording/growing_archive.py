"""An archive that grows with the calls of a loop: its rows, its example table, and the number of the next row.

Where several processes hold the model together, each has a `GrowingArchive`. The first of them makes the archive, keeps
the example table and seals; all of them store rows, as in `residua.capture.recording.record`.
"""

import logging
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from residua.capture.buffers.row_index import batch_rows
from residua.capture.identity.output import OutputSample
from residua.capture.identity.prediction import Prediction
from residua.capture.identity.provenance import describe_model, environment
from residua.capture.identity.sidecars import Sidecars, save_tokenizer, write_sidecars
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards, full_row_shape
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.recording.call import Call, Column
from residua.capture.recording.row_writer import RowWriter
from residua.capture.runtime.collectives import is_alone, on_rank
from residua.capture.runtime.devices import runs_on_cuda
from residua.capture.scheduling.membership import Membership
from residua.store.base.canonical import Json
from residua.store.base.errors import CaptureError
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import file_digest, with_notes
from residua.store.format.create import bring_archive, create_archive, workspace
from residua.store.format.plan import Plan, host_buffer_bytes
from residua.store.format.site_names import is_pattern
from residua.store.read.archive import Archive
from residua.store.sealing.losses import COMPUTED, cast_sites, loss_notes, losses_of
from residua.store.sealing.seal import seal
from residua.store.storage.destination import BucketFolder, Destination

_LOG = logging.getLogger(__name__)


class GrowingArchive:
    """Takes the rows of call after call, until `close`.

    Args:
        out: Where the new archive is written.
        model: The model, for the provenance.
        plan: What is stored, without a number of rows.
        computed: The data type that the model computes at each site.
        sidecars: The files in the archive's ``head`` folder.
        tokenizer: Stored in the archive, if there is one.
        shards: Finds out how the sites lie over the processes that hold the model.
        membership: This process among those that hold the model; None if it has all of it.
        process_layout: What it holds of the model; None if it has all of it.
        first_rows: Rows of the first call.
        host_memory: Memory that host buffers may take together, in bytes.
        threads: Encoder threads.
        predicts: What the model's logits are of, for the provenance.

    Raises:
        FileExistsError: There is something at `out`.
        CaptureError: The first process could not make the archive, or made one with another plan than this process
            would.
    """

    def __init__(
        self,
        out: Destination,
        model: nn.Module,
        plan: Plan,
        *,
        output: OutputSample | str,
        computed: Mapping[str, str],
        sidecars: Sidecars,
        tokenizer: PreTrainedTokenizerBase | None,
        shards: LocalShards,
        membership: Membership | None,
        process_layout: ProcessLayout | None,
        first_rows: int,
        host_memory: int,
        threads: int,
        predicts: Prediction | None = None,
    ) -> None:
        self._out = out
        self._plan = plan
        self._membership = membership

        def make() -> Mapping[str, Json]:
            with workspace(out) as folder:
                write_sidecars(folder, sidecars)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, folder / "tokenizer")
                of_rows: dict[str, Json] = {COMPUTED: cast_sites(plan.sites, computed)}
                described = describe_model(model, plan.model, output, predicts=predicts)
                of_model: dict[str, Json] = {"model": described}
                create_archive(folder, out, plan, {**of_model, **of_rows, **environment()})
            return {"plan": plan.digest}

        try:
            made = make() if membership is None else membership.once("archive", make)
        except (FileExistsError, BlockingIOError) as error:
            raise type(error)(error.errno, with_replica_hint(error.strerror or str(error))) from error
        if made["plan"] != plan.digest:
            bring_archive(out)
            differences = "; ".join(Archive(out.path).plan.differences(plan))
            raise CaptureError(
                f"the recorder{on_rank()} differs from that of the first rank that holds the model: {differences}. "
                "Make the same recorder on all of these ranks."
            )
        is_first = membership is None or not membership.number
        self._examples = ExampleWriter(out.path / "examples") if is_first else None
        self._rows = RowWriter(
            out,
            plan,
            process_layout=process_layout,
            shards=shards,
            most_rows=first_rows,
            host_memory=host_memory - _upload_bytes(out, plan, first_rows, host_memory),
            pinned=runs_on_cuda(model),
            threads=threads,
        )
        self._n_rows = 0
        self._n_examples = 0
        self._notes: dict[str, None] = {}
        self._shape = (0, 0)

    def begin(self, call: Call, keep: npt.NDArray[np.bool_] | None, columns: Mapping[str, Column]) -> None:
        """Number the rows of a call, and prepare buffers for them."""
        examples, rows = call.examples(keep, columns, first_example=self._n_examples, first_row=self._n_rows)
        if self._examples is not None:
            for example in examples:
                self._examples.add(example)
        self._n_examples += len(examples)
        self._n_rows += sum(len(example.positions) for example in examples)
        self._shape = call.shape
        sequence_of = None if call.starts is None else [sequence for sequence, _ in call.documents()]
        n_sequences, n_positions = call.shape
        batch = batch_rows(rows, n_positions, sequence_of=sequence_of, n_sequences=n_sequences)
        self._rows.exchange.begin(batch)

    def put(self, site: str, local: Tensor, layout: Layout) -> None:
        """Take this process's shard of one site's tensor.

        Raises:
            CaptureError: Its rows have another shape than those of the first call.
        """
        expected, found = self._plan.site(site).row_shape, full_row_shape(site, local, layout, self._shape)
        if found != expected and not is_pattern(site):
            raise CaptureError(
                f"{site} gave rows of shape {found} in this call, and {expected} in the first; all rows of a site have "
                "one shape. Record calls of one shape, or choose another site."
            )
        self._rows.exchange.put_shard(site, local, layout)

    def finish(self) -> None:
        """End a call in which every site was put: full shards go to the writer."""
        self._rows.filler.finish(self._flush_examples)
        self._rows.publish()

    def note(self, notes: Iterable[str]) -> None:
        """Keep what a reader of the archive should know in its provenance; written when it is sealed."""
        self._notes.update(dict.fromkeys(notes))

    def _flush_examples(self) -> dict[str, str]:
        file = None if self._examples is None else self._examples.flush()
        if file is None:
            return {}
        self._out.upload([f"examples/{file}"])
        return {file: file_digest(self._out.path / "examples" / file)}

    def close(self, error: BaseException | None) -> None:
        """Write what is full. Without an error also write the last shard and seal; then all processes call this.

        Raises:
            CaptureError: A shard could not be written, or another process that holds the model is gone.
        """
        try:
            if error is None:
                for shard in self._rows.filler.open_shards:
                    self._rows.filler.hand_over(shard, self._flush_examples())
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._rows.__exit__(None, error, None)
        self._warn()
        if error is None and self._membership is None:
            self._seal()
        elif error is None and self._membership is not None:
            self._membership.finish(self._seal)

    def _warn(self) -> None:
        """Log what is not finite in the rows that are committed here so far."""
        if not any(self._rows.writer.n_nonfinite.values()):
            return
        bring_archive(self._out)
        commits = Archive(self._out.path).commits
        own = {site.name: losses_of(site, commits).n_nonfinite for site in self._plan.sites}
        if found := {name: count for name, count in own.items() if count}:
            _LOG.warning("NaN or infinite values were recorded, and kept as they are: %s", found)
        for note in loss_notes(self._plan, commits):
            _LOG.warning("%s", note)

    def _seal(self) -> Mapping[str, Json]:
        if self._examples is None:
            raise RuntimeError("only the process that keeps the example table can seal the archive")
        self._flush_examples()
        index = self._examples.close()
        archive = Archive(self._out.path)
        sealed: dict[str, Json] = {"n_rows": self._n_rows, "n_examples": self._n_examples, "examples": index.digest}
        seal(self._out, with_notes(archive.metadata, self._notes), sealed)
        return {}


def _upload_bytes(out: Destination, plan: Plan, first_rows: int, host_memory: int) -> int:
    """Return the host memory that uploads take; raises PlanError if buffers leave too little for them."""
    if not isinstance(out, BucketFolder):
        return 0
    row_bytes = [site.row_bytes for site in plan.sites]
    buffers = host_buffer_bytes(sum(row_bytes), first_rows, plan.rows_per_shard)
    out.use_memory(host_memory - buffers, max(row_bytes) * plan.rows_per_shard)
    return out.memory_bytes


def with_replica_hint(found: str) -> str:
    """Return what was found at the place of a new archive, with a remedy where another replica may have made it."""
    if is_alone():
        return found
    return (
        f"{found}. Each data-parallel replica records its own examples into an archive of its own: give each replica "
        "another place, or fill one archive from all of them with residua.capture_dataset"
    )
