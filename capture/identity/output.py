"""What a model computes on a fixed batch of a few tokens: kept beside its weights, to know the model again.

Weights alone do not say which model this is: an adapter may be switched off, a hook may change what flows, an attribute
may scale. All of these change the output. Under the conditions of the capture (versions, threads, devices, layout) a
model gives the same output bit for bit, or differs by rounding; under others it rounds otherwise. So some of the values
are kept with their digest, and compared within a tolerance.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from residua.capture.identity.few_tokens import FewTokens, logits_of
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.wrappers import core_of
from residua.store.base.canonical import Json
from residua.store.base.untrusted import is_finite

_COLUMNS = 8  # values that are kept of each position, beside their root mean square
_MOST_VALUES = 10_000
# The largest error of a value, as a part of the largest value, under the same conditions.
_SAME = {"float64": 1e-12, "float32": 1e-5}
_SAME_LOW_PRECISION = 0.02
# Under other conditions the median error counts: in half precision a token may be routed to another expert.
_OTHER = {"float64": 1e-9, "float32": 1e-3}
_OTHER_LOW_PRECISION = 0.1


@dataclass(frozen=True, kw_only=True)
class OutputSample:
    """The output of a model on a few tokens.

    Attributes:
        shape: Shape of the output.
        dtype: Its type.
        sha256: Digest of all of it.
        values: Of each position some values, evenly spaced over the vocabulary, and the root mean square of all.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Json]:
        """Return the sample as JSON values."""
        return {**asdict(self), "shape": list(self.shape), "values": list(self.values)}

    @classmethod
    def from_json(cls, value: object) -> "OutputSample | None":
        """Return the sample that `to_json` gave; None for anything else, for example for a reason why there is none."""
        if not isinstance(value, Mapping):
            return None
        shape, values = value.get("shape"), value.get("values")
        if not isinstance(shape, list) or not isinstance(values, list) or len(values) > _MOST_VALUES:
            return None
        if not all(type(size) is int for size in shape) or not all(map(is_finite, values)):
            return None
        return cls(
            shape=tuple(shape),
            dtype=str(value.get("dtype")),
            sha256=str(value.get("sha256")),
            values=tuple(float(number) for number in values),
        )


def output_sample(model: nn.Module, few: FewTokens | None = None) -> OutputSample | str:
    """Run a model over a few tokens or images, in evaluation mode, and return what it gave, or why that is not known.

    A collective of all processes that hold the model; every one of them gets the same.

    Args:
        model: The model.
        few: Its run over a few tokens, if there was one.

    Raises:
        CaptureError: There is no memory to run the model.
    """
    core, few = core_of(model), few or FewTokens(model)
    found = few.problem or _sample(few.output)
    of_first_rank = all_gather_objects(tensor_parallel_group(core, None), found)[0]
    return all_gather_objects(pipeline_group(core), of_first_rank)[-1]


def _sample(output: object) -> OutputSample | str:
    logits = logits_of(output)
    if logits is None or not logits.numel():
        return "its output has no tensor of numbers"
    full = (logits.full_tensor() if isinstance(logits, DTensor) else logits).detach().cpu().contiguous()
    rows = full.reshape(-1, full.shape[-1]).to(torch.float64)
    rows = rows.nan_to_num(0.0, 0.0, 0.0)  # some models give minus infinity to tokens that are never predicted
    columns = torch.linspace(0, rows.shape[1] - 1, min(_COLUMNS, rows.shape[1])).round().long()
    values = torch.cat([rows[:, columns], rows.square().mean(1, keepdim=True).sqrt()], dim=1)
    return OutputSample(
        shape=tuple(full.shape),
        dtype=str(full.dtype).removeprefix("torch."),
        sha256=hashlib.sha256(_bytes(full)).hexdigest(),
        values=tuple(float(f"{value:.9g}") for value in values.flatten().tolist()),
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """How the output of a model differs from that of the captured one.

    Attributes:
        is_equal: Whether they are equal bit for bit.
        is_other: Whether they differ by more than rounding does.
        text: What was found; empty if they are equal.
    """

    is_equal: bool
    is_other: bool
    text: str


def compare_outputs(then: OutputSample, now: OutputSample, *, same_conditions: bool) -> OutputComparison:
    """Compare the output of a model with that of the captured one.

    Args:
        then: That of the captured model.
        now: That of this model.
        same_conditions: Whether versions, threads, devices and layout are those of the capture.
    """
    if then.sha256 == now.sha256:
        return OutputComparison(is_equal=True, is_other=False, text="")
    if then.shape != now.shape or len(then.values) != len(now.values):
        text = f"its output on a few tokens has the shape {now.shape}, and that of the captured model {then.shape}"
        return OutputComparison(is_equal=False, is_other=True, text=text)
    scale = max(map(abs, then.values)) or 1.0
    errors = [abs(a - b) / scale for a, b in zip(then.values, now.values, strict=True)]
    found, allowed = max(errors), _SAME.get(now.dtype, _SAME_LOW_PRECISION)
    if not same_conditions or then.dtype != now.dtype:
        found, allowed = (
            median(errors),
            max(_OTHER.get(dtype, _OTHER_LOW_PRECISION) for dtype in (then.dtype, now.dtype)),
        )
    text = (
        f"its output on a few tokens differs from that of the captured model by {found:.1e} of the largest value; "
        f"rounding explains up to {allowed:.0e}"
    )
    return OutputComparison(is_equal=False, is_other=not found <= allowed, text=text)
