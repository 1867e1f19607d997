"""Head outputs that pass a norm or a gate before the output projection: a note says so, and where they do not, none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.tap import tap
from tests.models.tiny import _GROUPED, ODD
from tests.unlike_models import UNLIKE, made

IDS = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def gated() -> Any:
    options: dict[str, Any] = {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1, 2],
    }
    return made(hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig(**{**_GROUPED, **options}))


CASES: dict[str, tuple[Any, bool]] = {
    "qwen3_next": (gated, True),
    "bitnet": (UNLIKE["bitnet"], True),
    "olmo2": (ODD["olmo2"], False),
    "stablelm": (UNLIKE["stablelm"], False),
    "lfm2": (UNLIKE["lfm2"], False),
    "bloom": (ODD["bloom"], False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_note_says_whether_the_projection_takes_something_else(name: str) -> None:
    make, is_changed = CASES[name]
    model = make()
    sites = resolve_sites(model, "z.1")
    path = next(
        path
        for path, _ in model.named_modules()
        if ".1." in path and path.endswith(("attn.o_proj", "attn.out_proj", "self_attention.dense"))
    )
    taken: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: taken.append(args[0]))
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), tap(model, sites, kept.__setitem__):
        model(input_ids=IDS)
    handle.remove()
    assert torch.equal(kept["z.1"].flatten(2), taken[0].view(*IDS.shape, -1)) != is_changed
    assert bool(sites["z.1"].note) == is_changed


def test_the_archive_keeps_the_note_once(tmp_path: Path) -> None:
    model = UNLIKE["bitnet"]()
    captured = residua.capture_dataset(model, IDS.tolist(), sites="z.*,q.0", out=tmp_path / "a.zarr")
    found: Any = captured.archive.provenance["notes"]
    assert [note for note in found if "a norm" in note and "z." in note] == [note for note in found if "gate" in note]
    assert sum("gate" in note for note in found) == 1
    with residua.Recorder(model, sites="z.*", out=tmp_path / "b.zarr"), torch.no_grad():
        model(input_ids=IDS)
    again: Any = residua.open(tmp_path / "b.zarr").provenance["notes"]
    assert sum("gate" in note for note in again) == 1
