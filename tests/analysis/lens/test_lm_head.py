"""The stored LM head decodes the final residual stream as the model does."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from residua.analysis.lens.lm_head import load_lm_head
from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.format.sidecars import LMHeadSpec
from tests.capture.site_readings import everything
from tests.lm_heads import save_lm_head
from tests.models.tiny import TINY


@pytest.mark.parametrize("name", TINY)
def test_the_stored_head_gives_the_models_logits(name: str, tmp_path: Path) -> None:
    """Within 1e-5 in float32, and bit for bit in bfloat16, where the order of rounding matters."""
    got = everything(name)
    save_lm_head(got.model, tmp_path)
    head = load_lm_head(tmp_path)
    torch.testing.assert_close(head.logits(got["final"]), got["logits"], atol=1e-5, rtol=1e-5)
    assert (head.width, head.vocabulary_size) == (32, 97)
    rough = everything(name, torch.bfloat16)
    save_lm_head(rough.model, tmp_path)
    assert torch.equal(load_lm_head(tmp_path).logits(rough["final"]), rough["logits"])


def test_a_head_is_loaded_in_the_requested_type(tmp_path: Path) -> None:
    got = everything("gemma2", torch.bfloat16)
    save_lm_head(got.model, tmp_path)
    head = load_lm_head(tmp_path, dtype=torch.float64)
    logits = head.logits(got["final"].double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, got["logits"].double(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_missing_or_cut_file_is_named_with_its_folder(name: str, tmp_path: Path) -> None:
    save_lm_head(TINY["llama"](), tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises((DamagedArchiveError, UnsafeArchiveError)):
        load_lm_head(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DamagedArchiveError, match=str(tmp_path)):
        load_lm_head(tmp_path)


@pytest.mark.parametrize("name", ["norm.weight", "unembed.weight", "stranger"])
def test_parameters_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    save_lm_head(TINY["llama"](), tmp_path)
    stored = load_file(tmp_path / "head.safetensors")
    stored[name] = torch.zeros(7)
    save_file(stored, tmp_path / "head.safetensors")
    with pytest.raises(UnsafeArchiveError, match=name):
        load_lm_head(tmp_path)


@settings(max_examples=60)
@given(
    st.binary(max_size=40)
    | st.fixed_dictionaries(
        {},
        optional={
            "norm": st.sampled_from(["rms", "other", None, 3]),
            "eps": st.floats() | st.text(max_size=3),
            "softcap": st.none() | st.floats(),
            "dtype": st.text(max_size=4) | st.integers(),
        },
    )
)
def test_any_other_head_json_is_refused(change: bytes | dict[str, object]) -> None:
    import json

    good = json.loads(LMHeadSpec(norm="rms", eps=1e-6, dtype="float32").to_json())
    text = change if isinstance(change, bytes) else json.dumps({**good, **change}).encode()
    try:
        spec = LMHeadSpec.from_json(text)
    except UnsafeArchiveError:
        return
    assert spec.norm in ("rms", "layer", "none")
    assert LMHeadSpec.from_json(spec.to_json()) == spec
