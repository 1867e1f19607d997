"""The fingerprint sees every weight and nothing else."""

import copy
import hashlib
import io
import json
from typing import Any

import google_crc32c
import pytest
import torch
from torch import Tensor, nn

from residua.capture.identity import fingerprint
from residua.capture.identity.fingerprint import weights_fingerprint
from residua.store.base.errors import CaptureError
from tests.models.tiny import TINY


class Weights(nn.Module):
    """Every kind of thing a state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.arange(7, dtype=torch.float32).to(torch.bfloat16))
        self.a = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.c = self.b  # tied


def test_the_definition_by_hand() -> None:
    lines = [
        ("a", [], "float64", torch.tensor(2.5, dtype=torch.float64).numpy().tobytes()),
        ("b", [7], "bfloat16", torch.arange(7.0).bfloat16().view(torch.int16).numpy().tobytes()),
        ("flags", [2], "bool", b"\x01\x00"),
    ]
    digest = hashlib.sha256()
    for name, shape, dtype, data in lines:
        digest.update(json.dumps([name, shape, dtype, google_crc32c.value(data)]).encode() + b"\n")
    assert weights_fingerprint(Weights()) == digest.hexdigest()


def test_the_size_of_the_chunks_does_not_matter() -> None:
    model = TINY["llama"]()
    assert weights_fingerprint(model, chunk_bytes=24) == weights_fingerprint(model)


def test_one_bit_one_name_or_one_type_changes_it() -> None:
    model = Weights()
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.b[3] += 0.125
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(nn.Module.double(Weights())) != before
    renamed = nn.Module()
    renamed.inner = Weights()
    assert weights_fingerprint(renamed) != before


def test_wrappers_and_layout_in_memory_do_not_change_it() -> None:
    model = TINY["gpt2"]()
    before = weights_fingerprint(model)
    assert weights_fingerprint(nn.DataParallel(model)) == before
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert weights_fingerprint(compiled) == before
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert weights_fingerprint(model) == before


def test_names_that_only_look_wrapped_keep_every_weight() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2, bias=False)
    model.register_parameter("weight", nn.Parameter(torch.ones(2)))
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.module.weight.add_(1)
    changed = weights_fingerprint(model)
    assert changed != before
    with torch.no_grad():
        model.get_parameter("weight").add_(1)
    assert weights_fingerprint(model) not in (before, changed)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"'weight'.*meta"):
        weights_fingerprint(nn.Linear(2, 2, bias=False, device="meta"))


class Extra(nn.Linear):
    """A layer with state that is no tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(3), torch.ones(3) * 2),
        ((torch.ones(2), None), (torch.ones(2), torch.ones(2))),
        ({"scale": 1.0}, {"scale": 2.0}),
        ({"a": [1, b"x"]}, {"a": [1, b"y"]}),
        (torch.float16, torch.bfloat16),
        (io.BytesIO(b"1"), io.BytesIO(b"2")),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    ],
)
def test_state_that_is_no_plain_tensor_counts(one: Any, other: Any) -> None:
    def again(value: Any) -> Any:
        return io.BytesIO(value.getvalue()) if isinstance(value, io.BytesIO) else copy.deepcopy(value)

    assert weights_fingerprint(Extra(one)) == weights_fingerprint(Extra(again(one)))
    assert weights_fingerprint(Extra(one)) != weights_fingerprint(Extra(other))


def test_an_object_counts_by_its_class_and_not_by_its_address() -> None:
    assert weights_fingerprint(Extra(object())) == weights_fingerprint(Extra(object()))


class Packed(Tensor):
    """A tensor made of others, as torchao's: integers and a scale a row."""

    codes: Tensor
    scale: Tensor
    bits: int

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, bits: int) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        self.codes, self.scale, self.bits = codes, scale, bits

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["codes", "scale"], {"bits": self.bits}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # it has no self
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].bits)
        raise NotImplementedError(f"{func} {types} {kwargs}")


def test_tensors_made_of_others_count_by_what_is_in_them() -> None:
    def model(code: int, scale: float, bits: int = 8) -> nn.Module:
        holder = nn.Module()
        packed = Packed(torch.full((2, 3), code, dtype=torch.int8), torch.full((2, 1), scale), bits)
        holder.weight = nn.Parameter(packed, requires_grad=False)
        return holder

    others = (model(1, 1.0), model(2, 1.0), model(1, 2.0), model(1, 1.0, 4))
    found = set(map(weights_fingerprint, others))
    assert len(found) == 4
    assert weights_fingerprint(model(1, 1.0)) in found


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_quantised_tensors_count_with_their_scales() -> None:
    def model(scale: float, axis: bool = False) -> nn.Module:
        holder = nn.Module()
        values = torch.arange(6.0).reshape(2, 3)
        scales, zeros = torch.full((2,), scale), torch.zeros(2, dtype=torch.long)
        holder.register_buffer(
            "codes",
            torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
            if axis
            else torch.quantize_per_tensor(values * scale, scale, 0, torch.qint8),
        )
        return holder

    assert len({weights_fingerprint(one) for one in (model(1.0), model(0.5), model(1.0, True), model(0.5, True))}) == 4


def test_names_inside_fairscale_are_those_without_it() -> None:
    class FlattenParamsWrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._fpw_module = inner

    bare, wrapped = nn.Module(), nn.Module()
    bare.layer = nn.Linear(2, 2)
    wrapped.layer = FlattenParamsWrapper(bare.layer)
    assert weights_fingerprint(wrapped) == weights_fingerprint(bare)


def test_unchanged_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[nn.Module] = []
    real = fingerprint.weights_fingerprint

    def counted(model: nn.Module) -> str:
        read.append(model)
        return real(model)

    monkeypatch.setattr(fingerprint, "weights_fingerprint", counted)
    model = TINY["llama"]()
    first = fingerprint.known_fingerprint(model, "a")
    assert fingerprint.known_fingerprint(model, "a") == first == real(model)
    assert len(read) == 1
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")

    def in_place() -> None:
        with torch.no_grad():
            weight[0, 0] += 1

    def by_data() -> None:
        weight.data = weight.data * 2

    def by_another() -> None:
        model.get_submodule("lm_head").weight = nn.Parameter(torch.ones(97, 32))

    for n_read, change in enumerate((in_place, by_data, by_another), start=2):
        before = real(model)
        change()
        assert fingerprint.known_fingerprint(model, "a") == real(model) != before
        assert len(read) == n_read
    assert fingerprint.known_fingerprint(model, "another output") == real(model)
    assert len(read) == 5
