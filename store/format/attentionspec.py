"""What ``head/attention.json`` says: how a layer's attention weights follow from its stored queries and keys.

An object from layer number to object, or to a text that says why the weights of this layer do not follow. With
query *i* and key *j* of one example, after rotary embedding, head *h* reading key head *h // (heads // key heads)*:

    score = scale * q_i . k_j                  then cap * tanh(score / cap) where there is a soft cap
    seen  = j <= i where causal is true, and j > i - window where there is a window
    weight = exp(score) / (sum of exp(score) over the keys seen + exp(sink of the head, where there are sinks))
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from residua.store.base.canonical import is_finite
from residua.store.base.errors import UnsafeArchiveError

ATTENTION_FILE = "attention.json"
_MOST_LAYERS = 2**16
_ADVICE = "no attention is like that; copy the archive again from where it came from"


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """How one layer's attention weights follow from its queries and keys; see the module's head.

    Attributes:
        scale: Factor on the products.
        causal: Whether a query sees no key behind it.
        softcap: Bound that the scores approach; None: unbounded.
        window: Keys that a query sees at most, its own included; None: all. Causal attention only.
        sinks: A score a head that takes its share of the weights and stands for no key; None: there are none.
    """

    scale: float
    causal: bool
    softcap: float | None = None
    window: int | None = None
    sinks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        numbers = [self.scale, *(() if self.softcap is None else (self.softcap,)), *(self.sinks or ())]
        if not all(is_finite(number) for number in numbers) or not isinstance(self.causal, bool):
            raise UnsafeArchiveError(f"Attention with scale, soft cap or sinks among {str(numbers)[:200]}: {_ADVICE}")
        if self.softcap is not None and self.softcap <= 0:
            raise UnsafeArchiveError(f"Attention with the soft cap {self.softcap}: {_ADVICE}")
        if self.window is not None and not (type(self.window) is int and self.window > 0 and self.causal):
            raise UnsafeArchiveError(f"Attention with the window {self.window!r}, causal {self.causal}: {_ADVICE}")


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
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsafeArchiveError(f"{ATTENTION_FILE} is no JSON: {error}. {_ADVICE}") from error
    if not isinstance(found, dict) or len(found) > _MOST_LAYERS:
        raise UnsafeArchiveError(f"{ATTENTION_FILE} holds {type(found).__name__}, not an object of layers. {_ADVICE}")
    return {_layer(number): entry if isinstance(entry, str) else _spec(entry) for number, entry in found.items()}


def _layer(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise UnsafeArchiveError(f"{ATTENTION_FILE} names the layer {text[:40]!r}. {_ADVICE}")
    return int(text)


def _spec(entry: object) -> AttentionSpec:
    names = {field.name for field in fields(AttentionSpec)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise UnsafeArchiveError(f"{ATTENTION_FILE} holds {str(entry)[:200]}, not {sorted(names)}. {_ADVICE}")
    sinks = entry["sinks"]
    if not isinstance(sinks, list | None):
        raise UnsafeArchiveError(f"{ATTENTION_FILE} holds the sinks {str(sinks)[:200]}. {_ADVICE}")
    return AttentionSpec(**{**entry, "sinks": None if sinks is None else tuple(sinks)})
