"""Small JSON files next to an archive's arrays: the LM head, attention, and fidelity.

`head/head.json` says how the final residual stream becomes logits. The parameters are in `head/head.safetensors`:
``norm.weight``, ``norm.bias``, ``project_out.weight``, ``transform.dense.weight``, ``transform.dense.bias``,
``transform.norm.weight``, ``transform.norm.bias``, ``unembed.weight`` and ``unembed.bias``, those that the model has.
They are applied in this order, then the scale, then the soft cap: ``cap * tanh(logits * scale / cap)``.

`head/attention.json` says how a layer's attention weights follow from its stored queries and keys: an object from
layer number to object, or to a text that says why they do not follow. With query *i* and key *j* of one example, after
rotary embedding, head *h* reading key head *h // (heads // key heads)*:

    score = scale * q_i . k_j                  then cap * tanh(score / cap) where there is a soft cap
    seen  = j <= i where causal is true, and j > i - window where there is a window
    weight = exp(score) / (sum of exp(score) over the keys seen + exp(sink of the head, where there are sinks))

`fidelity.json` says how much a model notices that stored rows are rounded. `residua fidelity` measures it. The file is
optional, no digest of the archive covers it, and nothing is read by it.

None of the three is trusted: every field is checked, and a field that is missing or unknown is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from residua.store.base.canonical import digested, with_digest
from residua.store.base.errors import DamagedArchiveError, PlanError, UnsafeArchiveError
from residua.store.base.naming import named
from residua.store.base.untrusted import is_finite, parse_json, read_file
from residua.store.format.archive_metadata import notes_in
from residua.store.format.plan import Plan
from residua.store.storage.destination import Destination, destination_of

Norm = Literal["rms", "layer", "none"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"]

LM_HEAD_FILE = "head.json"
PARAMETERS_FILE = "head.safetensors"
CONFIG_FILE = "config.json"
ATTENTION_FILE = "attention.json"
NO_LM_HEAD = "the archive has no LM head, so lenses cannot be trained from it"
"""How the note of an archive without an LM head begins; the reason follows after a colon."""
FIDELITY_FILE = "fidelity.json"
MAX_FIDELITY_BYTES = 2**24
_MAX_LAYERS = 2**16
_ADVICE = "copy the archive again from where it came from"


@dataclass(frozen=True, kw_only=True)
class LMHeadSpec:
    """How the final residual stream becomes logits, apart from the parameters.

    Attributes:
        norm: Kind of the final norm.
        eps: What the final norm adds to the variance or mean square.
        weight_offset: What is added to the norm's weight; 1 in Gemma, which stores the difference from 1.
        activation: Activation of a dense layer and layer norm before the unembedding (BERT); None: no such layer.
        transform_eps: What that layer norm adds to the variance.
        logit_scale: Factor on the logits.
        softcap: Bound that the logits approach; None: unbounded.
        dtype: Type of the model's parameters, for example ``bfloat16``.

    Raises:
        UnsafeArchiveError: A value makes no sense.
    """

    norm: Norm
    eps: float = 0.0
    weight_offset: float = 0.0
    activation: Activation | None = None
    transform_eps: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: str

    def __post_init__(self) -> None:
        numbers = [self.eps, self.weight_offset, self.transform_eps, self.logit_scale]
        _check_numbers(LM_HEAD_FILE, [*numbers, *(() if self.softcap is None else (self.softcap,))])
        if self.norm not in get_args(Norm) or self.activation not in (None, *get_args(Activation)):
            raise _unsafe(LM_HEAD_FILE, f"the norm {self.norm!r} and the activation {self.activation!r}")
        if self.softcap == 0 or not isinstance(self.dtype, str):
            raise _unsafe(LM_HEAD_FILE, f"the soft cap {self.softcap!r} and the dtype {self.dtype!r}")

    def to_json(self) -> bytes:
        """Return the text of ``head.json``."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "LMHeadSpec":
        """Read the text of ``head.json``.

        Raises:
            UnsafeArchiveError: It is not a JSON object of these fields, or a value makes no sense.
        """
        return cls(**_fields(LM_HEAD_FILE, cls, _parsed(LM_HEAD_FILE, text)))


def why_no_lm_head(provenance: Mapping[str, object]) -> str:
    """Return why an archive with this provenance has no LM head, as its notes say."""
    wanted = next((note for note in notes_in(provenance) if note.startswith(NO_LM_HEAD)), NO_LM_HEAD)
    return (
        f"{wanted}. Final norm and unembedding are kept of causal and masked language models whose logits they give, "
        f"unless {named('head', False)} left them out"
    )


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """How one layer's attention weights follow from its queries and keys; see the module's head.

    Attributes:
        scale: Factor on the products.
        causal: Whether a query sees no key after it.
        softcap: Bound that the scores approach; None: unbounded.
        window: Most keys that a query sees, its own included; None: all. Causal attention only.
        sinks: One score a head that takes a share of the weights and belongs to no key; None: there are none.

    Raises:
        UnsafeArchiveError: A value makes no sense.
    """

    scale: float
    causal: bool
    softcap: float | None = None
    window: int | None = None
    sinks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        numbers = [self.scale, *(() if self.softcap is None else (self.softcap,)), *(self.sinks or ())]
        _check_numbers(ATTENTION_FILE, numbers)
        if not isinstance(self.causal, bool) or (self.softcap is not None and self.softcap <= 0):
            raise _unsafe(ATTENTION_FILE, f"causal {self.causal!r} and the soft cap {self.softcap}")
        if self.window is not None and not (type(self.window) is int and self.window > 0 and self.causal):
            raise _unsafe(ATTENTION_FILE, f"the window {self.window!r} with causal {self.causal}")


def attention_to_json(layers: Mapping[int, AttentionSpec | str]) -> bytes:
    """Return the text of ``attention.json``."""
    entries = {str(n): layer if isinstance(layer, str) else asdict(layer) for n, layer in sorted(layers.items())}
    return json.dumps(entries, indent=2).encode() + b"\n"


def attention_from_json(text: bytes) -> dict[int, AttentionSpec | str]:
    """Read the text of ``attention.json``.

    Returns:
        From layer to how its weights follow, or to why they do not.

    Raises:
        UnsafeArchiveError: It is not such a text, or has values that make no sense.
    """
    found = _parsed(ATTENTION_FILE, text)
    if not isinstance(found, dict) or len(found) > _MAX_LAYERS:
        raise _unsafe(ATTENTION_FILE, f"{type(found).__name__}, not an object of layers")
    return {_layer(number): entry if isinstance(entry, str) else _attention(entry) for number, entry in found.items()}


def _layer(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise _unsafe(ATTENTION_FILE, f"the layer {text!r}")
    return int(text)


def _attention(entry: object) -> AttentionSpec:
    values = _fields(ATTENTION_FILE, AttentionSpec, entry)
    sinks = values["sinks"]
    if not isinstance(sinks, list | None):
        raise _unsafe(ATTENTION_FILE, f"the sinks {sinks!r}")
    return AttentionSpec(**{**values, "sinks": None if sinks is None else tuple(sinks)})


def _parsed(file: str, text: bytes) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UnsafeArchiveError(f"{file} is not JSON: {error}. To repair it, {_ADVICE}.") from error


def _fields(file: str, kind: type, value: object) -> dict[str, Any]:
    """Return `value` if it is an object of exactly the fields of the dataclass `kind`."""
    names = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        raise _unsafe(file, f"{value!r}, expected the fields {sorted(names)}")
    return value


def _check_numbers(file: str, numbers: list[float]) -> None:
    if not all(map(is_finite, numbers)):
        raise _unsafe(file, f"{numbers}, of which one is not a finite number")


def _unsafe(file: str, found: str) -> UnsafeArchiveError:
    return UnsafeArchiveError(f"{file} holds {found[:300]}. Residua writes no such file: {_ADVICE}.")


@dataclass(frozen=True, kw_only=True)
class SiteFidelity:
    """How the model's output changes if the stored rows of one site replace the computed ones.

    Attributes:
        kl_mean: Mean over tokens of KL(as computed || with stored rows), in nats.
        kl_max: The largest of them.
        top1_agreement: Share of tokens whose most likely next token stays the same.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What was measured for an archive.

    Attributes:
        sites: By name of the site.
        n_examples: Examples that ran.
        n_tokens: Their tokens.
    """

    sites: Mapping[str, SiteFidelity]
    n_examples: int
    n_tokens: int


def write_fidelity(archive: Path | Destination, plan: Plan, found: Fidelity) -> None:
    """Write `fidelity.json` of an archive, durably; an earlier one is replaced."""
    entry = {"plan": plan.digest, **asdict(found)}
    destination_of(archive).write(FIDELITY_FILE, [json.dumps(with_digest("fidelity", entry), indent=2).encode()])


def read_fidelity(archive: Path, plan: Plan) -> Fidelity | None:
    """Return what was measured for an archive; None if nothing was.

    Raises:
        DamagedArchiveError: The file is not what was written.
        PlanError: It was measured for another archive.
    """
    path = archive / FIDELITY_FILE
    if not path.exists():
        return None
    text = read_file(archive, path, MAX_FIDELITY_BYTES)
    try:
        entry = digested(parse_json(text), "fidelity")
        sites = {str(name): _site_fidelity(values) for name, values in entry["sites"].items()}
        found = Fidelity(sites=sites, n_examples=int(entry["n_examples"]), n_tokens=int(entry["n_tokens"]))
        digest = entry["plan"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedArchiveError(f"{path} cannot be read ({error}): measure again with residua fidelity") from error
    if digest != plan.digest:
        raise PlanError(f"{path} was measured for another archive: remove it, or run residua fidelity again")
    return found


def _site_fidelity(values: Mapping[str, object]) -> SiteFidelity:
    numbers = {field.name: values[field.name] for field in fields(SiteFidelity)}
    if not all(map(is_finite, numbers.values())):
        raise ValueError(f"{numbers} has a value that is not a finite number")
    return SiteFidelity(**{name: float(str(number)) for name, number in numbers.items()})
