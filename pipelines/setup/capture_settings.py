"""The settings of a capture: one frozen dataclass, whose fields are the flags of ``residua capture``."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from residua.capture.hooks.site import FLOATS, check_storage
from residua.pipelines.data.dataset_settings import DatasetOptions, DatasetSettings
from residua.store.base.errors import PlanError
from residua.store.base.naming import named, setting
from residua.store.base.sizes import Size, n_bytes
from residua.store.base.untrusted import parse_yaml
from residua.store.encoding.codecs import DEFAULT_PRESET, PRESETS

SITES_HELP = "sites, comma separated, with patterns: 'resid_post.*,attn_out.3'"
DEVICE_HELP = "device of the model: auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
TP_HELP = "processes to split each layer over, by transformers' tensor-parallel plan"
PP_HELP = "pipeline stages to split the layers into, each of --tp processes"

_MAX_CONFIG_BYTES = 64 * 1024
_MOST_BITS = 63
_KINDS: Mapping[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "collections.abc.Sequence": list,
    "collections.abc.Mapping": dict,
    "None": type(None),
}


@dataclass(frozen=True, kw_only=True)
class CaptureSettings(DatasetSettings):
    """How to turn a dataset into an archive. Each field is a flag of ``residua capture``.

    Raises:
        PlanError: A value is out of range or contradicts another.
        DatasetError: The same of a setting of the dataset.
    """

    sites: str | Sequence[str] = setting("resid_post.*", SITES_HELP)
    dtype: str | None = setting(
        None, f"data type to store: {', '.join(FLOATS)} (default: each site's own, as the model computes it)"
    )
    codec: str = setting(DEFAULT_PRESET, f"codec preset: {', '.join(PRESETS)}")
    rows_per_shard: int | None = setting(None, "rows of a shard, a power of two (default: shards of about 32 MiB)")
    head: bool = setting(
        True,
        "store the final norm and the unembedding, which lenses need; --no-head keeps all weights out",
    )
    gather: bool = setting(
        True,
        "store full rows of a model under tensor parallelism; with --no-gather each process stores its own columns",
    )
    batch_tokens: int = setting(8192, "largest number of token positions in a batch, padding included")
    model_dtype: str = setting("auto", f"data type to compute in: auto (the checkpoint's), {', '.join(FLOATS)}")
    attn_implementation: str | None = setting(
        None, "attention implementation of transformers: eager, sdpa, ... (default: the model's own)"
    )
    revision: str | None = setting(None, "revision of the model on the hub (default: main)")
    seed: int = setting(0, "seed for everything random in the model, and for sampling with --generate")
    device: str = setting("auto", DEVICE_HELP)
    device_map: str | None = setting(
        None, "spread one model over the devices of this process: auto, balanced, sequential (default: one device)"
    )
    tp: int = setting(1, TP_HELP)
    pp: int = setting(1, PP_HELP)
    host_memory: int | str = setting("4GiB", "host memory for buffered rows, such as 2GB or 4GiB; a number is bytes")
    threads: int | None = setting(
        None, "threads that encode and write (default: 1 on a CPU, up to 4 if the model is on a GPU)"
    )
    join: bool = setting(False, "share the work with runs that write this archive now, and let later ones join")
    keep_paths: bool = setting(
        False, "in a bucket: keep absolute paths of this machine in the provenance, and not their last part alone"
    )
    grow: bool = setting(
        False, "let the model run before the dataset is read to its end, for datasets of 10^8 tokens or more"
    )

    def __post_init__(self) -> None:
        check_storage(
            codec=self.codec,
            dtype=self.dtype,
            rows_per_shard=self.rows_per_shard,
            threads=self.threads,
        )
        if self.model_dtype not in (known := ("auto", *FLOATS)):
            raise PlanError(f"{named('model_dtype', self.model_dtype)} is not known: choose one of {', '.join(known)}")
        if not all(isinstance(pattern, str) for pattern in self.sites):
            raise PlanError(f"{named('sites')} holds something else than texts: give names or patterns of sites")
        n_bytes(self.host_memory, "host_memory")
        for name in ("batch_tokens", "tp", "pp"):
            if (value := getattr(self, name)) < 1:
                raise PlanError(f"{named(name, value)}: it must be at least 1")
        if self.tp * self.pp > 1 and self.device_map is not None:
            raise PlanError(
                f"{named('device_map')} cannot be combined with {named('tp')} or {named('pp')}, under which each "
                "process has one device: leave one of them out"
            )
        if self.grow:
            self._refuse_growing()
        super().__post_init__()

    def _refuse_growing(self) -> None:
        """Raise PlanError for settings whose captures need all examples first."""
        together = "the processes that hold a model together run the same batches at the same time"
        for name, default, why in (
            ("generate", None, "prompts are all continued before the model captures"),
            ("image_column", None, "images are all read before the model captures"),
            ("tp", 1, together),
            ("pp", 1, together),
        ):
            if (value := getattr(self, name)) != default:
                raise PlanError(
                    f"{named('grow', True)} cannot be combined with {named(name, value)}, since {why}: leave one out"
                )

    @property
    def site_patterns(self) -> str:
        """`sites` as one text, as the command line has them."""
        return self.sites if isinstance(self.sites, str) else ",".join(self.sites)

    @property
    def host_memory_bytes(self) -> int:
        """`host_memory` in bytes."""
        return n_bytes(self.host_memory, "host_memory")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings in `values`, whose keys are fields (``max_length``) or flags (``--max-length``).

        Raises:
            PlanError: A key is not a setting or appears twice, or a value has the wrong type or range.
            DatasetError: A setting of the dataset is out of range or contradicts another.
        """
        known = {f.name: f for f in fields(cls)}
        named = {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}
        for name, value in named.items():
            if name not in known:
                raise PlanError(
                    f"{reprlib.repr(name)} is not a setting of residua capture; the settings are {', '.join(known)}"
                )
            kinds = [_KINDS[kind.partition("[")[0]] for kind in _type_name(known[name].type).split(" | ")]
            if not _fits(value, kinds):
                wanted = " | ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise PlanError(f"setting {name} is {_shown(value)}: it should be {wanted}")
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise PlanError(f"setting {name} is a number of {value.bit_length():,} bits: that is too large")
        if len(named) < len(values):
            raise PlanError(f"a setting is given twice, as a field and as a flag: {', '.join(map(str, values))}")
        return cls(**named)


class CaptureOptions(DatasetOptions, total=False):
    """The fields of `CaptureSettings`, as named arguments of a call: what they mean is said there."""

    sites: str | Sequence[str]
    dtype: str | None
    codec: str
    rows_per_shard: int | None
    head: bool
    gather: bool
    batch_tokens: int
    model_dtype: str
    attn_implementation: str | None
    revision: str | None
    seed: int
    device: str
    device_map: str | None
    tp: int
    pp: int
    host_memory: Size
    threads: int | None
    join: bool
    keep_paths: bool
    grow: bool


def _type_name(annotation: object) -> str:
    return str(annotation).removeprefix("<class '").removesuffix("'>")


def _fits(value: object, kinds: Sequence[type]) -> bool:
    fitting = (*kinds, int) if float in kinds else tuple(kinds)
    return isinstance(value, fitting) and (bool in kinds or not isinstance(value, bool))


def _shown(value: object) -> str:
    """Return a value for a message; of a nested value, which may be huge, only its type."""
    return reprlib.repr(value) if isinstance(value, str | bytes | float | bool) else f"a {type(value).__name__}"


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file.

    Raises:
        PlanError: The file is missing, too large or not a mapping of settings, or it refers to its own values
            (YAML anchors), which could turn a small file into a huge value. Nothing in it is ever executed.
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
