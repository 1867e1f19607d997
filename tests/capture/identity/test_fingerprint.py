"""The fingerprint sees every weight and nothing else."""

import hashlib
import json

import google_crc32c
import pytest
import torch
from torch import nn

from residua.capture.identity.fingerprint import weights_fingerprint
from residua.store.base.errors import CaptureError
from tests.models import TINY


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
