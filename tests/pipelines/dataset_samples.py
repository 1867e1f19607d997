"""Small datasets of every kind, a tokenizer that splits at spaces, and helpers to read them."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.examples.index import Example

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", "a", "b", "c", "d", "e", "f", "g"]


TEXTS = ["a b c", "", "d e f g a", "b"]


UNKNOWN = {"unk_token": "<unk>"}


CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": "user", "content": "e"}],
]


TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


def make_tokenizer(template: str | None = None, single: str = "<s> $A") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, **UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", **UNKNOWN}
    build: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer: PreTrainedTokenizerFast = build(tokenizer_object=backend, model_max_length=4, **special)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer(TEMPLATE)


def ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


def read(
    source: object, *, tokenizer: Any = TOKENIZER, model_limit: int | None = None, **options: Any
) -> tuple[list[Example], DatasetReport]:
    report = DatasetReport()
    examples = read_examples(
        source,
        settings=DatasetSettings(**options),
        tokenizer=tokenizer,
        model_limit=model_limit,
        special_ids=frozenset({0, 1}),
        vocab_size=len(WORDS),
        report=report,
    )
    return list(examples), report


def tokens(examples: list[Example]) -> list[list[int]]:
    return [example.input_ids.tolist() for example in examples]


def positions(examples: list[Example]) -> list[list[int]]:
    return [example.positions.tolist() for example in examples]


def table_of(texts: list[str]) -> pa.Table:
    return pa.table({"text": texts, "label": list(range(len(texts)))})


def write_source(folder: Path, kind: str) -> Path:
    """Write TEXTS with a column label in one of the formats, and return the path."""
    path = folder / f"data.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in table_of(TEXTS).to_pylist())
    if kind in ("parquet", "PARQUET"):
        pq.write_table(table_of(TEXTS), path, row_group_size=2)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind in ("csv", "tsv"):
        gap = "\t" if kind == "tsv" else ","
        path.write_text(f"text{gap}label\n" + "".join(f"{t}{gap}{i}\n" for i, t in enumerate(TEXTS)))
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table_of(TEXTS).schema) as writer:
            writer.write_table(table_of(TEXTS))
    elif kind == "saved":
        datasets.Dataset.from_dict(table_of(TEXTS).to_pydict()).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table_of(TEXTS), path / "part-0.parquet")
    else:
        path.write_text(lines)
    return path
