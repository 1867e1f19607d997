"""What logits predict, and the logits of classifiers in a replay: against the plain model on each example alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.identity.prediction import prediction_of
from residua.store.base.errors import PlanError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.models.tiny import _GROUPED, _SIZES, ODD, TINY
from tests.unlike_models import UNLIKE, made

EXAMPLES = [[5, 6, 7, 9], [8, 9, 10], [11, 12, 13, 40, 41], [50, 9, 31]]


def of(kind: Any, **settings: Any) -> PreTrainedModel:
    sizes = _GROUPED if kind.config_class.model_type == "llama" else _SIZES
    return made(kind, kind.config_class(**{**sizes, **settings}))


CLASSIFIERS: dict[str, tuple[Any, str]] = {
    "bert sequences": (lambda: of(hf.BertForSequenceClassification, num_labels=4), "examples"),
    "bert three labels": (lambda: of(hf.BertForSequenceClassification, num_labels=3), "examples"),
    "bert pairs": (lambda: of(hf.BertForNextSentencePrediction), "examples"),
    "bert tokens": (lambda: of(hf.BertForTokenClassification, num_labels=3), "tokens"),
    "bert questions": (lambda: of(hf.BertForQuestionAnswering), "tokens"),
    "bert pre-training": (lambda: of(hf.BertForPreTraining), "tokens"),
    "electra": (lambda: of(hf.ElectraForPreTraining, embedding_size=32), "tokens"),
    "roberta": (lambda: of(hf.RobertaForSequenceClassification, num_labels=2), "examples"),
    "llama": (lambda: of(hf.LlamaForSequenceClassification, num_labels=5), "examples"),
    "llama, another padding token": (
        lambda: of(hf.LlamaForSequenceClassification, num_labels=5, pad_token_id=90),
        "examples",
    ),
    "llama tokens": (lambda: of(hf.LlamaForTokenClassification, num_labels=3), "tokens"),
    "llama questions": (lambda: of(hf.LlamaForQuestionAnswering), "tokens"),
}


def alone(model: PreTrainedModel, example: list[int]) -> Tensor:
    """What transformers gives for one example; classes are the last axis."""
    ids = torch.tensor([example])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "start_logits" in output:
        return torch.stack([output.start_logits[0], output.end_logits[0]], -1)
    found: Tensor = output["prediction_logits" if "prediction_logits" in output else "logits"]
    if isinstance(model, hf.ElectraForPreTraining):
        return found[0, :, None]
    return found if found.ndim == 2 else found[0]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_replays_its_own_logits(name: str, tmp_path: Path) -> None:
    make, prediction = CLASSIFIERS[name]
    model = make()
    assert prediction_of(model) == prediction
    captured = residua.capture_dataset(model, EXAMPLES, sites="resid_post.1", out=tmp_path / "a.zarr")
    assert any("no next-token loss" in note for note in captured.notes)
    for at in (None, "resid_post.1"):
        with residua.replay(model, captured.archive, examples=[0, 1, 2, 3], at=at) as run:
            for example, logits in zip(EXAMPLES, run.logits, strict=True):
                torch.testing.assert_close(logits, alone(model, example), rtol=1e-4, atol=1e-4)
            assert run.metric("kl").abs() < 1e-6
            difference = run.metric({"logit_difference": [0, 1 if run.logits[0].shape[1] > 1 else 0]})
            expected = [alone(model, example)[-1].float() for example in EXAMPLES]
            torch.testing.assert_close(
                difference, torch.stack([each[0] - each[min(1, len(each) - 1)] for each in expected]).mean()
            )
            with pytest.raises(PlanError, match="no next-token loss"):
                run.metric("loss")
            with pytest.raises(PlanError, match="no next-token loss"):
                run.losses  # noqa: B018 - it raises


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("llama", "next token"),
        ("gpt2", "next token"),
        ("mixtral", "next token"),
        ("bloom", "next token"),
        ("mamba", "next token"),
        ("bert", "tokens"),
        ("roberta", "tokens"),
        ("xlm", "tokens"),
        ("nystromformer", "tokens"),
        ("albert", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_the_next_token_is_predicted_is_found_by_a_run(name: str, prediction: Any, dtype: torch.dtype) -> None:
    model = {**TINY, **ODD, **UNLIKE}[name]()
    nn.Module.to(model, dtype)
    assert prediction_of(model) == prediction


def test_the_archive_says_what_the_logits_predict(tmp_path: Path) -> None:
    bert, llama = TINY["bert"](), TINY["llama"]()
    of_bert = residua.capture_dataset(bert, EXAMPLES, sites="final", out=tmp_path / "b.zarr").archive
    of_llama = residua.capture_dataset(llama, EXAMPLES, sites="final", out=tmp_path / "l.zarr").archive
    with residua.Recorder(bert, sites="final", out=tmp_path / "r.zarr"), torch.no_grad():
        bert(input_ids=torch.tensor(EXAMPLES[:1]))

    def said(archive: Archive) -> tuple[object, bool]:
        notes: Any = archive.provenance.get("notes") or []
        model: Any = archive.provenance["model"]
        return model["predicts"], any("no next-token loss" in note for note in notes)

    assert said(of_bert) == said(residua.open(tmp_path / "r.zarr")) == ("tokens", True)
    assert said(of_llama) == ("next token", False)
    result = residua.replay_dataset(bert, of_bert, at="final", out=tmp_path / "replayed")
    assert set(result.tokens["loss"].to_pylist()) == {None}


def test_whole_example_logits_have_no_table_of_tokens(tmp_path: Path) -> None:
    model = of(hf.BertForSequenceClassification)
    archive = residua.capture_dataset(model, EXAMPLES, sites="final", out=tmp_path / "a.zarr").archive
    with pytest.raises(PlanError, match=r"residua\.replay"):
        residua.replay_dataset(model, archive, out=tmp_path / "replayed")


@pytest.mark.parametrize("kind", [hf.BertForMultipleChoice, hf.RobertaForMultipleChoice])
def test_multiple_choice_is_refused_by_name(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownSiteError, match="choices"):
        residua.capture_dataset(of(kind), EXAMPLES, sites="resid_post.*", out=tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()
