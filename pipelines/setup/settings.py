"""What a capture can be told: one frozen dataclass, whose fields are the command line's flags."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from residua.capture.sites.site import FLOATS, check_storage
from residua.pipelines.data.dataset import DatasetSettings
from residua.store.base.errors import PlanError
from residua.store.base.untrusted import parse_yaml
from residua.store.encoding.codecs import DEFAULT_PRESET, PRESETS
from residua.store.format.plan import HOST_MEMORY_BYTES

_MAX_CONFIG_BYTES = 64 * 1024
_MOST_BITS = 63


def _flag(default: Any, text: str) -> Any:
    """Return a field whose help on the command line is `text`."""
    return field(default=default, metadata={"help": text})


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``--max-length`` for ``max_length``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """How to turn a dataset into an archive. Each field is a flag of `residua capture`."""

    sites: str = _flag("resid_post.*", "sites, comma separated, with patterns: 'resid_post.*,attn_out.3'")
    dtype: str | None = _flag(
        None, f"data type to store: {', '.join(FLOATS)} (default: each site's own, as the model computes it)"
    )
    codec: str = _flag(DEFAULT_PRESET, f"codec preset: {', '.join(PRESETS)}")
    split: str | None = _flag(None, "split of the dataset (default: train, or the only one)")
    text_column: str | None = _flag(None, "column that holds the text (default: 'text', or the only text column)")
    subset: str | None = _flag(None, "subset of a dataset on the hub")
    dataset_revision: str | None = _flag(None, "revision of a dataset on the hub")
    min_length: int = _flag(1, "leave out examples of fewer tokens; they are counted")
    max_tokens: int | None = _flag(None, "stop after this many tokens of the dataset")
    max_length: int | None = _flag(None, "tokens an example may have (default: what the model takes)")
    long_examples: str | None = _flag(
        None, "longer examples: refuse, split, truncate (default: split if --max-length is given, else refuse)"
    )
    positions: str = _flag("all", "positions to keep: all, last, every:N, column:NAME, assistant")
    drop_special: bool = _flag(False, "keep no rows of special tokens, such as BOS")
    batch_tokens: int = _flag(8192, "most token positions in one batch, padding included")
    device: str = _flag("auto", "device of the model: auto, cpu, cuda, cuda:1, ...")
    device_map: str | None = _flag(None, "spread the model over devices: auto, balanced, sequential")
    tp: int = _flag(1, "split the model over so many processes by tensor parallelism (transformers' plan)")
    pp: int = _flag(1, "split the model's blocks over so many stages, each of --tp processes (transformers' pipeline)")
    model_dtype: str = _flag("auto", f"data type to compute in: auto (the checkpoint's), {', '.join(FLOATS)}")
    attn_implementation: str | None = _flag(None, "attention implementation: eager, sdpa, ... (default: the model's)")
    revision: str | None = _flag(None, "revision of the model on the hub")
    seed: int = _flag(0, "seed of everything random in the model")
    rows_per_shard: int | None = _flag(None, "height of a shard in rows, a power of two (default: about 32 MiB)")
    host_memory: int = _flag(HOST_MEMORY_BYTES, "bytes of host memory that staging may take")
    threads: int | None = _flag(None, "threads that encode and write (default: 1, and up to 4 beside a GPU)")
    head: bool = _flag(True, "store the final norm and unembedding, which lenses need; --no-head shares no weights")
    gather: bool = _flag(
        True, "bring split rows together; without (--no-gather, under --tp) each process stores its own columns of them"
    )
    join: bool = _flag(False, "share the work with runs that are at this archive, and let others join")

    def __post_init__(self) -> None:
        check_storage(
            codec=self.codec,
            dtype=self.dtype,
            rows_per_shard=self.rows_per_shard,
            threads=self.threads,
            named=flag_of,
        )
        if self.model_dtype not in (known := ("auto", *FLOATS)):
            raise PlanError(f"--model-dtype {self.model_dtype} is not known: choose one of {', '.join(known)}")
        for name in ("batch_tokens", "host_memory", "tp", "pp"):
            if (value := getattr(self, name)) < 1:
                raise PlanError(f"{flag_of(name)} is {value}: it must be at least 1")
        if self.tp * self.pp > 1 and self.device_map is not None:
            raise PlanError("--device-map and --tp or --pp contradict each other: a process of those has one device")
        self.dataset_settings()

    def dataset_settings(self) -> DatasetSettings:
        """Return the part that reads the dataset."""
        return DatasetSettings(
            text_column=self.text_column,
            split=self.split,
            subset=self.subset,
            revision=self.dataset_revision,
            min_length=self.min_length,
            max_tokens=self.max_tokens,
            max_length=self.max_length,
            long_examples=self.long_examples,
            positions=self.positions,
            drop_special=self.drop_special,
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings that `values` spells, keys written as fields or as flags.

        Raises:
            PlanError: A key is not a setting or is there twice, or a value is not one that it may have.
            DatasetError: A setting of the dataset is out of range or contradicts another.
        """
        known = {f.name: f for f in fields(cls)}
        named = {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}
        for name, value in named.items():
            if name not in known:
                raise PlanError(
                    f"{reprlib.repr(name)} is not a setting of residua capture; the settings are {', '.join(known)}"
                )
            if not _fits(value, type_name := _type_name(str(known[name].type))):
                raise PlanError(f"setting {name} is {_shown(value)}: it should be {type_name}")
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise PlanError(f"setting {name} is a number of {value.bit_length():,} bits: that is too large")
        if len(named) < len(values):
            raise PlanError(f"a setting is given twice, in two spellings: {', '.join(map(str, values))}")
        return cls(**named)


def _fits(value: object, annotation: str) -> bool:
    names = {"str": str, "int": int, "bool": bool, "None": type(None)}
    allowed = tuple(names[part.strip()] for part in annotation.split("|"))
    return isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))


def _shown(value: object) -> str:
    """Return a value for a message; what is nested may be too large to be spelled."""
    return reprlib.repr(value) if isinstance(value, str | bytes | float | bool) else f"a {type(value).__name__}"


def _type_name(annotation: str) -> str:
    return annotation.removeprefix("<class '").removesuffix("'>")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file.

    Raises:
        PlanError: The file is not a flat mapping of settings, or refers to its own parts, which could make a
            small file a huge value; nothing in it is ever executed.
    """
    if not path.is_file():
        raise PlanError(f"--config {path}: there is no such file")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise PlanError(f"--config {path} is over 64 KiB: it should hold settings")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"--config {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise PlanError(f"--config {path} should be a mapping of settings, for example 'max-length: 128'")
    return values
