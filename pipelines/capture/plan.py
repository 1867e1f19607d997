"""What is settled before the model runs: the examples, written, and the plan that follows from them."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.sites.site import SiteInfo, plan_sites
from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.setup.models import token_limit
from residua.pipelines.setup.settings import CaptureSettings
from residua.store.base.canonical import Json
from residua.store.base.errors import DatasetError
from residua.store.examples.index import ExampleIndex
from residua.store.examples.writer import ExampleWriter
from residua.store.format.plan import Plan, check_host_memory, choose_rows_per_shard

DatasetSource = str | PathLike[str] | Iterable[Any]


def write_examples(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: DatasetSource,
    *,
    settings: CaptureSettings,
    report: DatasetReport,
    on_example: Callable[[int, int], None],
) -> ExampleIndex:
    """Read the dataset once, and write its examples to `folder`.

    Args:
        folder: The example table's folder; it is made.
        model: Whose longest input and vocabulary bound the examples.
        tokenizer: Needed for texts, and to leave special tokens out.
        dataset: What `residua.capture_dataset` takes.
        settings: How examples are made.
        report: Counts what was read, cut and left out.
        on_example: Called with the examples and tokens so far, after each example.

    Raises:
        DatasetError: The dataset cannot be used as asked.
    """
    if settings.drop_special and tokenizer is None:
        raise DatasetError(
            "--drop-special needs a tokenizer, and the model comes without: nothing says what is special"
        )
    writer = ExampleWriter(folder)
    examples = read_examples(
        dataset,
        settings=settings,
        tokenizer=tokenizer,
        model_limit=token_limit(model),
        vocab_size=model.config.get_text_config().vocab_size,
        special_ids=frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset(),
        report=report,
    )
    for example in examples:
        writer.add(example)
        on_example(report.n_examples, report.n_tokens)
    return writer.close()


def make_plan(
    settings: CaptureSettings,
    infos: Mapping[str, SiteInfo],
    index: ExampleIndex,
    *,
    identity: Mapping[str, Json],
    column_shards: Mapping[str, int],
) -> Plan:
    """Return the plan of a capture.

    Args:
        settings: What was asked.
        infos: The sites, as the model has them.
        index: Lengths of the examples.
        identity: What tells the model from any other.
        column_shards: Into how many parts the rows of sites are cut.

    Raises:
        PlanError: The sites do not fit the codec, or not even one shard fits the memory that is allowed.
    """
    longest, most_rows = int(index.n_tokens.max()), int(index.n_rows.max())
    sites = plan_sites(
        infos, dtype=settings.dtype, codec=settings.codec, longest_example=longest, column_shards=column_shards
    )
    row_bytes = [site.row_bytes for site in sites]
    height = settings.rows_per_shard or choose_rows_per_shard(
        row_bytes,
        batch_rows=min(settings.batch_tokens, index.total_rows),
        most_rows_per_example=most_rows,
        host_memory_bytes=settings.host_memory,
    )
    staged = min(height, index.total_rows)  # a stage is no taller than the archive
    check_host_memory(row_bytes, most_rows, staged, settings.host_memory)
    return Plan(
        model=identity,
        dataset=dataset_entry(index),
        rules=settings.rules(),
        sites=sites,
        rows_per_shard=height,
        batch_tokens=settings.batch_tokens,
        n_rows=index.total_rows,
    )


def dataset_entry(index: ExampleIndex) -> dict[str, Json]:
    """Return what a plan says of its examples."""
    return {
        "digest": index.digest,
        "n_examples": index.n_examples,
        "n_tokens": index.total_tokens,
        "longest_example": int(index.n_tokens.max()),
    }
