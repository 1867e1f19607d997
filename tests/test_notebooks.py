"""The notebooks run, what their texts claim is so, and their committed outputs come from their committed code."""

import copy
import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbformat import NotebookNode

from tests.pages import ROOT, run

TOOL = runpy.run_path(str(ROOT / "scripts/run_notebooks.py"))
IN_A_KERNEL = "first-look"
"""The notebook that runs as Jupyter runs it; the others run in this process, which is cheaper."""
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def notebook(name: str) -> NotebookNode:
    found: NotebookNode = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return found


def code_cells(found: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in found.cells if cell.cell_type == "code"]


def outputs(found: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(found) for output in cell.outputs]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_the_code_without_errors(name: str) -> None:
    found = notebook(name)
    nbformat.validate(found)
    again = f"python scripts/run_notebooks.py notebooks/{name}.ipynb"
    assert found.metadata.residua.code == TOOL["code_digest"](found), f"the code was changed: {again}"
    assert [cell.execution_count for cell in code_cells(found)] == list(range(1, len(code_cells(found)) + 1)), again
    assert not [output for output in outputs(found) if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs(found))
    shown = [str(output.get("text", output.get("data", {}).get("text/plain"))) for output in outputs(found)]
    assert not [text for text in shown if re.search(r"/(tmp|home|work|root)/|site-packages", text)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of a notebook, beside a copy of everything that it may need."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def names_of(name: str) -> dict[str, Any]:
    """Run a notebook in this process, and return its variables."""
    torch.set_num_threads(1)
    mpl.use("Agg")
    names: dict[str, Any] = {}
    try:
        run([cell.source for cell in code_cells(notebook(name))], names)
        plt.gcf().canvas.draw()
    finally:
        plt.close("all")
    return names


@pytest.mark.slow
def test_a_kernel_runs_a_notebook_and_gives_its_committed_texts(tmp_path: Path) -> None:
    committed = notebook(IN_A_KERNEL)
    found = copy.deepcopy(committed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own, about event loops and unencrypted ports
        TOOL["run"](found, tmp_path)
    assert [output.output_type for output in outputs(found)] == [output.output_type for output in outputs(committed)]
    assert [output.get("data", {}).keys() for output in outputs(found)] == [
        output.get("data", {}).keys() for output in outputs(committed)
    ]
    assert found.metadata == committed.metadata


def test_probes_know_the_context_and_the_embedding_does_not(folder: Path) -> None:
    names = names_of("probes-from-an-archive")
    everywhere, in_context = names["everywhere"]["balanced_accuracy"], names["in_context"]["balanced_accuracy"]
    assert 0.55 < everywhere["embed"] < everywhere.drop("embed").min() < everywhere.max() < 0.9
    assert in_context["embed"] == 0.5
    assert in_context.drop("embed").min() > 0.7
    controls = names["in_context"]["control_balanced_accuracy"]
    assert controls.between(0.4, 0.65).all()


def test_an_autoencoder_learns_and_recovers_much_of_the_loss(folder: Path) -> None:
    names = names_of("train-an-autoencoder")
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert names["missed"] < 0.4
    assert (names["features"] > 0).sum(1).max() <= 16
    assert names["whole"] < names["reconstructed"] < names["ablated"]
    assert (names["ablated"] - names["reconstructed"]) / (names["ablated"] - names["whole"]) > 0.65


def test_the_answer_is_traced_to_two_cells_and_the_direction_steers(folder: Path) -> None:
    names = names_of("causal-tracing-and-steering")
    strongest = names["attention"].stack().nlargest(2)
    assert set(strongest.index) == {("attn_out.1", 6), ("attn_out.3", 15)}
    assert strongest.min() > 0.6
    steered, random = torch.tensor(list(names["counted"].values())).mean(-1)
    assert steered[3] > 2 * random[3]
    losses = names["losses"]["difference of means"]
    assert losses[1] == min(losses)
