"""What ``head/head.json`` says: how the final residual stream becomes logits.

The parameters lie beside it in ``head.safetensors``: ``norm.weight``, ``norm.bias``, ``project_out.weight``,
``transform.dense.weight``, ``transform.dense.bias``, ``transform.norm.weight``, ``transform.norm.bias``,
``unembed.weight`` and ``unembed.bias``, those that the model has. They are applied in this order, then the
scale, then the soft cap: ``cap * tanh(logits * scale / cap)``.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from residua.store.base.canonical import is_finite
from residua.store.base.errors import UnsafeArchiveError

Norm = Literal["rms", "layer", "none"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"]

HEAD_FILE = "head.json"
PARAMETERS_FILE = "head.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """How the final residual stream becomes logits, apart from the parameters.

    Attributes:
        norm: Kind of the final norm.
        eps: What the final norm adds to the variance or mean square.
        weight_offset: What is added to the norm's weight; 1 in Gemma, which stores the difference from 1.
        activation: Activation of a dense layer and layer norm before the unembedding (BERT); None: no such
            layer.
        transform_eps: What that layer norm adds to the variance.
        logit_scale: Factor on the logits.
        softcap: Bound that the logits approach; None: unbounded.
        dtype: Type of the model's parameters, for example ``bfloat16``.
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
        if self.softcap is not None:
            numbers.append(self.softcap)
        if self.norm not in get_args(Norm) or self.activation not in (None, *get_args(Activation)):
            raise UnsafeArchiveError(f"Head with norm {self.norm!r} and activation {self.activation!r}: {_ADVICE}")
        if not all(map(is_finite, numbers)) or self.softcap == 0:
            raise UnsafeArchiveError(f"Head with eps, offset, scale or soft cap among {str(numbers)[:200]}: {_ADVICE}")
        if not isinstance(self.dtype, str):
            raise UnsafeArchiveError(f"Head of type {self.dtype!r}: {_ADVICE}")

    def to_json(self) -> bytes:
        """Return the text of ``head.json``."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "HeadSpec":
        """Read the text of ``head.json``.

        Raises:
            UnsafeArchiveError: It is no JSON object of these fields with values that make sense.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UnsafeArchiveError(f"{HEAD_FILE} is no JSON: {error}. {_ADVICE}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise UnsafeArchiveError(f"{HEAD_FILE} holds {str(found)[:200]}, not {sorted(names)}. {_ADVICE}")
        return cls(**found)


_ADVICE = "no head is like that; copy the archive again from where it came from"
