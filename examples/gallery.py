"""Draw the pictures of docs/gallery.md from the model that ships: a few minutes on two cores.

    python examples/gallery.py docs/gallery

Each picture comes from the command or the lines that the page shows above it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydoc_topics import write_topics
from transformers import AutoModelForCausalLM

import residua

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"


def main(pictures: Path) -> None:
    """Draw all pictures into `pictures`."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        from_archive(work, pictures)
        from_circuits(work, pictures)
        from_prompts(pictures)


def from_archive(work: Path, pictures: Path) -> None:
    """Draw what analyses of an archive show."""
    write_topics(work / "topics.jsonl")
    acts = work / "acts.zarr"
    words = ["--model", MODEL, "--dataset", work / "topics.jsonl", "--max-length", 128, "--dtype", "bfloat16"]
    residua_command("capture", *words, "--out", acts)
    residua_command("lens", "train", acts, "--rows", 60_000, "--out", work / "lens")
    residua_command("probe", acts, "--target", "position > 10", "--out", work / "probe")
    residua_command("stats", acts, "--out", work / "stats")
    for source, name in (("lens/report", "tuned-lens"), ("probe/probe", "probe"), ("stats/norms", "norms")):
        shutil.copy(work / f"{source}.png", pictures / f"{name}.png")


def from_circuits(work: Path, pictures: Path) -> None:
    """Draw induction scores, and a patching sweep over repeated random tokens."""
    residua_command("induction", "--model", MODEL, "--out", work / "repeats.zarr")
    shutil.copy(work / "repeats-heads" / "induction.png", pictures / "induction.png")
    archive = residua.open(work / "repeats.zarr")
    pairs = []
    for ids in archive.examples["input_ids"].slice(0, 6).to_pylist():
        wrecked = [*ids[:10], (ids[10] + 1) % 1024, *ids[11:61]]
        pairs.append({"clean": ids[:61], "corrupted": wrecked, "answer": ids[11], "wrong": ids[30]})
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    residua.patch(model, pairs, sites="attn_out.*", positions=[8, 9, 10, 11, 12, 13, 14, -1], out=work / "patched")
    shutil.copy(work / "patched" / "cells.png", pictures / "patch.png")


def from_prompts(pictures: Path) -> None:
    """Draw the views of a run over one prompt."""
    run = residua.run(
        MODEL, "The list is sorted in place, and the list is", sites="resid_post.*, pattern.3", device="cpu"
    )
    views: dict[str, Any] = {
        "logit-lens": run.logit_lens().plot(0),
        "attribution": run.attribution("logit", " a").plot(0),
        "pattern": run.pattern_plot(3, 0),
    }
    for name, axes in views.items():
        axes.figure.savefig(pictures / f"{name}.png")


def residua_command(*words: Any) -> None:
    """Run one residua command."""
    print("residua", *words, flush=True)
    subprocess.run([sys.executable, "-m", "residua", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
