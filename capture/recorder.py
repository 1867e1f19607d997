"""Recording in a loop that the user owns: every call of the model appends rows.

    with residua.Recorder(model, sites="resid_post.*", out="acts.zarr") as recorder:
        for batch in loader:
            recorder.annotate(columns={"label": batch.pop("label")})
            model(**batch)

Rows follow the calls: examples in batch order, tokens in their order, without the positions that `attention_mask`
masks. The size of the archive is open until the context is left; then it is sealed. After an exception the archive
is left unsealed, with every shard that was committed, and can be read as far as it goes.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from inspect import signature
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from residua.capture.attention_facts import attention_files
from residua.capture.call import Call, Column, example_rows, read_call
from residua.capture.compiled import refuse_compiled
from residua.capture.cuda_streams import writer_threads
from residua.capture.devices import runs_on_cuda
from residua.capture.head import save_head
from residua.capture.provenance import describe_model, environment, identify_model
from residua.capture.rows import batch_rows, by_position, row_shape
from residua.capture.siteplans import check_storage, plan_site
from residua.capture.sites import resolve_sites
from residua.capture.split import is_split, layout_of
from residua.capture.staging import Staging
from residua.capture.taps import reading
from residua.capture.tokenizer import save_tokenizer
from residua.store.archive import Archive
from residua.store.canonical import Json
from residua.store.codecs import DEFAULT_PRESET
from residua.store.create import create_archive, seal, workspace
from residua.store.errors import CaptureError, PlanError
from residua.store.examples import ExampleWriter
from residua.store.files import write_file
from residua.store.metadata import file_digest
from residua.store.plan import Plan, SitePlan
from residua.store.sizes import HOST_MEMORY_BYTES, n_stages, shard_rows
from residua.store.wording import few
from residua.store.writer import ShardWriter

_LOG = logging.getLogger(__name__)


class Recorder:
    """Appends the rows of every call of `model` to a new archive; see the module's head.

    Args:
        model: Any torch module; canonical sites need a transformers model.
        sites: Site names or patterns, for example ``"resid_post.*, attn_out.3"``.
        out: Folder of the new archive.
        dtype: Data type to store floating-point sites in; None keeps what the model computes.
        codec: Codec preset.
        rows_per_shard: Height of a shard, a power of two; None follows the widest site.
        host_memory: Memory that stages may take together, in bytes.
        tokenizer: Stored in the archive, so that rows can be shown as text.
        max_length: Most tokens of an example; needed for `pattern` sites only, whose rows are that wide.
        threads: Encoder threads; None takes 1, and up to 4 beside a GPU.
        head: Whether final norm and unembedding are stored, which lenses need.

    Raises:
        FileExistsError: `out` exists already.
        UnknownSiteError: The model lacks a site.
        CaptureError: The model is compiled, or split over several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: str | Iterable[str],
        out: str | PathLike[str],
        dtype: str | None = None,
        codec: str = DEFAULT_PRESET,
        rows_per_shard: int | None = None,
        host_memory: int = HOST_MEMORY_BYTES,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        head: bool = True,
    ) -> None:
        self.path = Path(out)
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists: a recorder makes a new archive; choose another place")
        refuse_compiled(model)
        _refuse_split(model)
        check_storage(codec=codec, dtype=dtype, rows_per_shard=rows_per_shard, threads=threads)
        self._model = model
        self._sites = resolve_sites(model, sites)
        self._attention = attention_files(model, self._sites)
        self._dtype = dtype
        self._codec = codec
        self._rows_per_shard = rows_per_shard
        self._host_memory = host_memory
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._threads = threads or writer_threads(model)
        self._head = head
        self._stack = ExitStack()
        self._session: _Session | None = None
        self._held: dict[str, torch.Tensor] = {}
        self._call: Call | None = None
        self._keep: npt.NDArray[np.bool_] | None = None
        self._columns: Mapping[str, Column] = {}

    def __repr__(self) -> str:
        return f"<Recorder of {few(list(self._sites))} into {self.path}>"

    def annotate(self, *, columns: Mapping[str, Column] | None = None, keep: torch.Tensor | None = None) -> None:
        """Describe the next call.

        Args:
            columns: Per name, one value an example, as a sequence, tensor or array; they go into the example table.
            keep: Which positions become rows, bool, (examples, positions); masked ones never do.
        """
        self._columns = dict(columns or {})
        self._keep = None if keep is None else keep.cpu().numpy().astype(bool)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            self._taps = stack.enter_context(reading(self._model, self._sites, self._put))
            after = self._model.register_forward_hook(self._after)
            stack.callback(after.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._session is None:
            if error is None:
                raise CaptureError("the model was not called inside the recorder, so there is nothing to keep")
            return
        self._session.close(finish=error is None)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = read_call(signature(module.forward).parameters, args, kwargs)
        if self._session is not None:
            self._session.begin(self._call, self._keep, self._columns)

    def _put(self, site: str, tensor: torch.Tensor) -> None:
        if self._call is None:
            raise CaptureError(f"{site} fired outside a call of the recorded model: call the model itself")
        tensor = by_position(site, tensor, *self._call.shape)
        if self._session is None:
            self._held[site] = tensor.to("cpu", copy=True)  # one call of every site may be more than the device has
        else:
            self._session.check_shape(site, tensor)
            self._session.staging.put(site, tensor)

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self._taps.end_forward()
        if self._call is None:
            raise CaptureError("a call of the model ended that did not begin")
        if self._session is None:
            plan = self._plan(self._call)
            rows = int(self._call.mask.sum())
            self._session = _Session(
                self._model,
                plan,
                self.path,
                attention=self._attention,
                tokenizer=self._tokenizer,
                batch_rows=rows,
                host_memory=self._host_memory,
                threads=self._threads,
                head=self._head,
            )
            self._session.begin(self._call, self._keep, self._columns)
            for site, tensor in self._held.items():
                self._session.staging.put(site, tensor)
            self._held = {}
        self._session.finish()
        self._call, self._keep, self._columns = None, None, {}

    def _plan(self, call: Call) -> Plan:
        sites = tuple(self._site_plan(site, self._held[site]) for site in self._sites)
        height = self._rows_per_shard or shard_rows(
            [site.row_bytes for site in sites],
            batch_rows=int(call.mask.sum()),
            most_rows_per_example=int(call.mask.sum()),
            host_memory_bytes=self._host_memory,
        )
        return Plan(
            model=identify_model(self._model), dataset={}, rules={"loop": "user"}, sites=sites, rows_per_shard=height
        )

    def _site_plan(self, site: str, rows: torch.Tensor) -> SitePlan:
        shape = row_shape(rows)
        if site.startswith("pattern."):
            if self._max_length is None:
                raise PlanError(f"{site} has rows as wide as the longest example: pass max_length to Recorder")
            shape = (*shape[:-1], self._max_length)
        computed = str(rows.dtype).removeprefix("torch.")
        return plan_site(site, shape, computed, dtype=self._dtype, codec=self._codec)


def _refuse_split(model: nn.Module) -> None:
    if is_split(model):
        raise CaptureError(
            f"the model is split over processes ({layout_of(model)}), and each would record its own part: capture a "
            "dataset with residua.capture_dataset, which puts the parts together, or read it with residua.tap"
        )


class _Session:
    """An archive that grows: its writer, its example table and the next free row."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        path: Path,
        *,
        attention: Mapping[str, bytes],
        tokenizer: PreTrainedTokenizerBase | None,
        batch_rows: int,
        host_memory: int,
        threads: int,
        head: bool,
    ) -> None:
        self._path = path
        self._plan = plan
        with workspace(path) as folder:
            if head:
                save_head(model, folder / "head")
            for name, content in attention.items():
                write_file(folder / "head" / name, [content])
            if tokenizer is not None:
                save_tokenizer(tokenizer, folder / "tokenizer")
            create_archive(folder, path, plan, {"model": describe_model(model, plan.model), **environment()})
        self._examples = ExampleWriter(path / "examples")
        self._writer = ShardWriter(path, plan, threads=threads)
        pinned = runs_on_cuda(model)
        self.staging = Staging(
            plan,
            self._writer,
            n_stages=n_stages(batch_rows, plan.rows_per_shard),
            most_stages=host_memory // (plan.rows_per_shard * sum(site.row_bytes for site in plan.sites)),
            pinned=pinned,
        )
        self._n_rows = 0
        self._n_examples = 0

    def begin(self, call: Call, keep: npt.NDArray[np.bool_] | None, columns: Mapping[str, Column]) -> None:
        examples, padded = call.examples(keep, columns)
        rows = example_rows(examples, padded, self._n_examples, self._n_rows)
        for example in examples:
            self._examples.add(example)
        self._n_examples += len(examples)
        self._n_rows += sum(len(example.positions) for example in examples)
        self.staging.begin(batch_rows(rows, call.shape[1]))

    def check_shape(self, site: str, tensor: torch.Tensor) -> None:
        expected, found = self._plan.site(site).row_shape, row_shape(tensor)
        if found != expected and not site.startswith("pattern."):
            raise CaptureError(
                f"{site} gave rows of shape {found} in this call, and {expected} in the first: the rows of an archive "
                "are alike. Record calls of one shape, or choose another site."
            )

    def finish(self) -> None:
        self.staging.finish(self._flush_examples)

    def _flush_examples(self) -> dict[str, str]:
        part = self._examples.flush()
        return {} if part is None else {part: file_digest(self._path / "examples" / part)}

    def close(self, *, finish: bool) -> None:
        try:
            if finish:
                for shard in self.staging.open_shards:
                    self.staging.hand_over(shard, self._flush_examples())
        finally:
            self._writer.close()
        found = {path: count for path, count in self._writer.n_nonfinite.items() if count}
        if found:
            _LOG.warning("NaN or infinite values were recorded, and kept as they are: %s", found)
        if finish:
            index = self._examples.close()
            archive = Archive(self._path)
            sealed: dict[str, Json] = {"n_rows": self._n_rows, "n_examples": self._n_examples, "examples": index.digest}
            seal(self._path, archive.metadata, archive.commits, sealed)
