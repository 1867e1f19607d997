"""`residua.run`: a model over a few prompts, with edits, in memory.

    run = residua.run("models/pydoc-1m", ["def main():"], sites="resid_post.*", edits=[...])
    run.logits[0]          # (tokens, vocabulary)
    run["resid_post.3"][0] # (tokens, width)

A run is what a replay is, over prompts instead of the examples of an archive.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike, fspath

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedTokenizerBase

from residua.capture.hooks.site import SiteInfo, plan_sites
from residua.capture.identity.fingerprint import WeightsSeen
from residua.capture.replay.engine import Replayer
from residua.capture.replay.prompts import Prompts
from residua.capture.replay.replay import ready_to_run
from residua.capture.replay.result_memory import ResultMemory
from residua.capture.replay.unedited import unedited_rows
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.reference_model import unsharded_sites
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.runs.prompts import read_prompts
from residua.pipelines.runs.result import Run
from residua.pipelines.runs.texts import Texts
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import load_model, load_tokenizer, tokenizer_of, transformers_model
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.base.sizes import Size, n_bytes
from residua.store.edits.parser import EditSource, parse_edits
from residua.store.encoding.codecs import DEFAULT_PRESET
from residua.store.examples.memory import ExamplesInMemory
from residua.store.format.plan import HOST_MEMORY_BYTES, choose_rows_per_shard

_BATCH_TOKENS = 8192


def run(
    model: str | PathLike[str] | nn.Module | PipelineScheduleSingle,
    prompts: object,
    *,
    sites: str | Iterable[str] = (),
    edits: EditSource = (),
    grad: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    add_special_tokens: bool | None = None,
    add_generation_prompt: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
    batch_tokens: int = _BATCH_TOKENS,
    host_memory: Size = HOST_MEMORY_BYTES,
    device: str = "auto",
) -> Run:
    """Run a model over prompts, with edits, and keep its logits and sites in memory.

    The model runs at once, in evaluation mode, in as many batches as `batch_tokens` says; afterwards it is as it was.
    A site that was not kept costs a run of its own when it is asked for. Nothing is compared with an archive, so no
    weights are read for it. If several processes hold the model, all of them make the same run; see `residua.tap`.

    An edit that takes rows of other examples (`swap`, `mean`, or `set` to ``stored``) takes those of this run without
    its edits, or of the archive that it names.

    Args:
        model: A transformers model, wrapped or spread over processes; a hub id or folder of one; or the schedule of a
            torch pipeline.
        prompts: A text, a list of token ids or a chat (a list of messages), or several of them; what a tokenizer
            returns; or rows (dictionaries) with such a column and others, which edits can select by.
        sites: Sites to keep, by names or patterns.
        edits: Edits in order, as `residua.replay` takes them.
        grad: Run with gradients, for ``run.gradients``; the prompts then have to fit one batch.
        tokenizer: Tokenizer of a model that is passed as an object; by default the one that it was loaded with.
        add_special_tokens: Put the tokenizer's special tokens, such as BOS, around each text; by default where the
            text does not begin with them itself.
        add_generation_prompt: End each chat with the start of an assistant's turn.
        inputs: What the model gets beside tokens and mask, such as ``pixel_values``: tensors by name, for the prompts
            in their order.
        tensor_parallel: The ranks over which activations are split, if the model does not show them.
        batch_tokens: Most token positions of one batch, padding included.
        host_memory: Bytes, or a text such as ``4GiB``, that logits, sites and rows for edits may take; more is refused
            before the model runs.
        device: Device of a model that is loaded here.

    Returns:
        The run.

    Raises:
        PlanError: A prompt is empty or too long, or a text and there is no tokenizer; an edit does not fit, or changes
            no token; the results would not fit into `host_memory`. The model has not run.
        UnknownSiteError: The model has no such site.

    Example:
        >>> found = residua.run("models/pydoc-1m", ["Hello world"], sites="resid_post.*")  # doctest: +SKIP
        >>> found["resid_post.3"][0].shape  # doctest: +SKIP
        torch.Size([2, 128])
    """
    parsed, most_bytes = parse_edits(edits), n_bytes(host_memory, "host_memory")
    if isinstance(model, str | PathLike):
        name = fspath(model)
        settings = CaptureSettings(device=device)
        texts = Texts(tokenizer or load_tokenizer(name, settings), name)
        model = load_model(name, settings)
    else:
        texts = Texts(tokenizer, "this model", partial(tokenizer_of, model))
    ready = partial(ready_to_run, model, tensor_parallel)
    with ready() as ready_model:
        core = transformers_model(core_of(ready_model), "residua.run")
        dataset = DatasetSettings(add_special_tokens=add_special_tokens, add_generation_prompt=add_generation_prompt)
        examples, notes = read_prompts(prompts, core, texts, dataset)
        kept = unsharded_sites(core, [sites] if isinstance(sites, str) else list(sites)) if sites else {}
        source = _prompts(examples, kept, batch_tokens=batch_tokens, host_memory=most_bytes)
        memory = ResultMemory(most_bytes)
        rows = unedited_rows(ready_model, source, parsed, memory, inputs=inputs, tensor_parallel=tensor_parallel)
        replayer = Replayer(
            ready_model, source, edits=parsed, inputs=inputs, tensor_parallel=tensor_parallel, stored=rows
        )
        found = Run(
            replayer,
            range(len(examples)),
            list(kept),
            grad=grad,
            texts=texts,
            ready=ready,
            memory=memory,
            weights=WeightsSeen(core),
        )
        found.notes = (*found.notes, *notes)
        found.compute()
    return found


def _prompts(
    examples: ExamplesInMemory, sites: Mapping[str, SiteInfo], *, batch_tokens: int, host_memory: int
) -> Prompts:
    """Return the examples with the batches of a capture of the same examples and sites."""
    if batch_tokens < 1:
        raise PlanError(f"{named('batch_tokens', batch_tokens)}: it must be at least 1")
    index = examples.index()
    longest = int(index.n_tokens.max())
    planned = plan_sites(sites, dtype=None, codec=DEFAULT_PRESET, longest_example=longest)
    height = choose_rows_per_shard(
        [site.row_bytes for site in planned] or [1],
        batch_rows=min(batch_tokens, index.total_rows),
        most_rows_per_example=longest,
        host_memory_bytes=host_memory,
    )
    return Prompts(example_table=examples, batch_tokens=batch_tokens, rows_per_shard=height)
