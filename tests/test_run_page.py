"""Run the code of docs/run.md, and compare what it says with the model itself."""

from typing import Any

import matplotlib as mpl
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.pages import ROOT, blocks, run


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the page's code, and return its variables."""
    mpl.use("agg")
    found: dict[str, Any] = {"work": tmp_path_factory.mktemp("work")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(blocks("docs/run.md"), found)
    return found


def test_the_run_is_that_of_the_model(names: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "pydoc-1m").train(False)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([names["ids"]]), output_hidden_states=True)
    torch.testing.assert_close(names["logits"], found.logits[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(names["rows"], found.hidden_states[4][0], rtol=1e-4, atol=1e-3)
    assert names["text"] == names["prompts"][0]
    assert names["heads"].ndim == 3
    assert len(names["lines"]) == sum(len(ids) for ids in names["run"].tokens)


def test_edits_generation_and_gradients_do_what_the_page_says(names: dict[str, Any]) -> None:
    assert names["moved"] > 0
    assert names["divergence"] > 0
    assert [len(tokens) <= 12 for tokens in names["written"]] == [True, True]
    assert names["gradient"].shape == names["rows"].shape


def test_views_and_archives_are_there(names: dict[str, Any]) -> None:
    assert names["by_layer"]["resid_post.5"] == pytest.approx(0, abs=1e-4)
    assert (names["work"] / "logit-lens.png").is_file()
    logits = names["logits"][-1]
    first, second = (names["run"]._texts.token(text) for text in (" a", " the"))
    assert names["parts"].logits[0] == pytest.approx(float(logits[first] - logits[second]), rel=1e-3, abs=1e-3)
    assert len(names["largest"]) == 3
    assert torch.equal(torch.from_numpy(names["archive"].example(0)["resid_post.3"]), names["rows"])
    assert names["edited"].provenance["replay"]["reproducible"]
