"""Token types, boxes and languages that a loop gave: kept with the examples, and given to the model again."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from torch import Tensor

import residua
from residua.store.base.errors import PlanError, ResiduaError
from residua.store.examples.index import INPUT_PREFIX, OTHER_INPUTS
from residua.store.read.archive import Archive
from tests.models.tiny import _SIZES, TINY
from tests.unlike_models import made

IDS = torch.randint(5, 97, (2, 10), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0
TYPES = (torch.arange(10) >= torch.tensor([[3], [6]])).long()


def of_pairs() -> tuple[Any, dict[str, Tensor]]:
    return TINY["bert"](), {"token_type_ids": TYPES}


def of_boxes() -> tuple[Any, dict[str, Tensor]]:
    config = hf.LayoutLMConfig(**{**_SIZES, "max_2d_position_embeddings": 32})
    corners = torch.randint(0, 16, (2, 10, 2), generator=torch.Generator().manual_seed(6))
    return made(hf.LayoutLMForMaskedLM, config), {
        "bbox": torch.cat([corners, corners + 7], -1),
        "token_type_ids": TYPES,
    }


def of_languages() -> tuple[Any, dict[str, Tensor]]:
    config = hf.XmodConfig(**_SIZES, languages=("en_XX", "de_DE"), default_language="en_XX")
    return made(hf.XmodForMaskedLM, config), {"lang_ids": torch.tensor([0, 1])}


def recorded(model: Any, out: Path, *calls: dict[str, Tensor]) -> tuple[Archive, list[Tensor]]:
    with residua.Recorder(model, sites="resid_post.*,z.1", out=out), torch.no_grad():
        logits = [model(**call).logits for call in calls]
    assert residua.verify(out).is_sound
    return residua.open(out), logits


@pytest.mark.parametrize("make", [of_pairs, of_boxes, of_languages])
def test_a_replay_gives_the_model_what_the_loop_gave(make: Any, tmp_path: Path) -> None:
    model, others = make()
    call = {"input_ids": IDS, "attention_mask": MASK, **others}
    archive, (logits,) = recorded(model, tmp_path / "a.zarr", call)
    assert archive.examples[OTHER_INPUTS].to_pylist() == [list(others)] * 2
    for name, value in others.items():
        kept = archive.examples[INPUT_PREFIX + name].to_pylist()
        assert kept == [value[0][:7].tolist() if value.ndim > 1 else value[0].item(), value[1].tolist()]
    with torch.no_grad():
        without = model(input_ids=IDS, attention_mask=MASK).logits
    assert not torch.allclose(without[1], logits[1], atol=1e-3)
    for at in (None, "z.1", "resid_post.1"):
        for examples in ([0, 1], [1], [1, 0]):
            with residua.replay(model, archive, examples=examples, at=at) as run:
                for example, found in zip(examples, run.logits, strict=True):
                    expected = logits[example][: len(found)]
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_examples_of_one_segment_run_with_zeros_beside_others(tmp_path: Path) -> None:
    model, others = of_pairs()
    plain = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    archive, (first, second) = recorded(model, tmp_path / "a.zarr", plain, plain | others)
    with residua.replay(model, archive, examples=[1, 3]) as run:
        torch.testing.assert_close(run.logits[0], first[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.logits[1], second[1], rtol=1e-4, atol=1e-4)


def test_jobs_that_give_tokens_alone_refuse_such_examples(tmp_path: Path) -> None:
    model, others = of_pairs()
    archive, _ = recorded(model, tmp_path / "a.zarr", {"input_ids": IDS, **others})
    with pytest.raises(PlanError, match=r"token_type_ids.*tokens and mask alone"):
        residua.replay_dataset(model, archive, capture="resid_post.1", out=tmp_path / "b.zarr")


@pytest.mark.parametrize("name", ["input_ids", "token_type"])
def test_inputs_that_the_model_does_not_take_are_refused(name: str, tmp_path: Path) -> None:
    model, others = of_pairs()
    archive, _ = recorded(model, tmp_path / "a.zarr", {"input_ids": IDS, **others})
    with pytest.raises(PlanError, match=f"inputs has {name},"):
        residua.replay(model, archive, examples=[0], inputs={name: IDS}).__enter__()


@pytest.mark.parametrize("values", [[[1] * 4, [1] * 10], [[[1] * 9] * 10] * 2, [["a"] * 10] * 2])
def test_values_that_do_not_fit_the_tokens_are_refused(values: Any, tmp_path: Path) -> None:
    model, others = of_pairs()
    recorded(model, tmp_path / "a.zarr", {"input_ids": IDS, **others})
    (part,) = (tmp_path / "a.zarr" / "examples").glob("*.parquet")
    table = pq.read_table(part)
    name = f"{INPUT_PREFIX}token_type_ids"
    changed = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(changed, part)
    with pytest.raises(ResiduaError):
        residua.replay(model, tmp_path / "a.zarr", examples=[0], force=True).__enter__()
