"""Run the notebooks in `notebooks/` and keep what they show: `make notebooks`.

    python scripts/run_notebooks.py [NOTEBOOK ...]

Each runs from the first cell in a kernel of its own, in a copy of its folder. What it prints to standard error, such as
progress, is left out. The digest of its code is kept beside the outputs, so that a test notices code that did not run.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
_SECONDS = 300  # for one cell


def code_digest(notebook: NotebookNode) -> str:
    """Return the digest of the code of a notebook."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run a notebook in a copy of its folder, in `folder`; its outputs are then those of this run."""
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    (folder / "models").symlink_to(ROOT / "models")
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name="python3",
        coalesce_streams=True,  # else a slow machine divides what a cell prints into more outputs
        resources={"metadata": {"path": str(folder / "notebooks")}},
    )
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "residua": {"code": code_digest(notebook)},
        }
    )


def main(names: list[str]) -> None:
    """Run the notebooks with these paths, or all of them, and write them back."""
    for path in map(Path, names or sorted(map(str, NOTEBOOKS.glob("*.ipynb")))):
        print(path, flush=True)
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
