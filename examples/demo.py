"""The steps of `make demo`: capture a dataset into an archive, study it without the model, and replay it.

    python examples/demo.py demo

Every step is a command or a few lines that you can type yourself. The demo prints them while it runs.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pydoc_topics import write_topics
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import residua

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"


def main(folder: Path) -> None:
    """Run the demo in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset, archive, lens, repeats = (folder / name for name in ("topics.jsonl", "acts.zarr", "lens", "repeats.zarr"))
    for made in (archive, lens, repeats, folder / "repeats-heads", folder / "page"):
        shutil.rmtree(made, ignore_errors=True)
    print(f"\n# A dataset: the {write_topics(dataset)} topics of Python's own documentation, in {dataset}")

    print("\n# 1. Capture the residual stream after every block, and the attention output of block 3")
    words = ["capture", "--model", MODEL, "--dataset", dataset, "--sites", "resid_post.*,attn_out.3"]
    words += ["--max-length", "128", "--dtype", "bfloat16", "--out", archive]
    rate = next(line for line in run(words).splitlines() if line.startswith("rate")).removeprefix("rate").strip()

    print("\n# 2. Look: what the archive holds")
    run(["info", archive])

    print("\n# 3. Verify every checksum")
    run(["verify", archive])

    read_back(archive)

    print("\n# 5. A tuned lens: what each layer would predict, trained from the archive alone")
    run(["lens", "train", archive, "--rows", 60_000, "--out", lens])

    print("\n# 6. Induction heads: queries and keys on repeated random tokens, scored offline")
    run(["induction", "--model", MODEL, "--out", repeats])

    page = folder / "page"
    print("\n# 7. A page to look at, without a server: examples token by token, lens read-outs, strongest rows")
    run(["page", archive, "--lens", lens, "--heads", folder / "repeats-heads", "--examples", 300, "--out", page])

    table = pq.read_table(folder / "repeats-heads" / "heads.parquet")
    best = table.sort_by([("induction", "descending")]).slice(0, 1).to_pylist()[0]
    losses = causal_check(repeats, best["layer"])
    conclude(archive, rate)
    conclude_analysis(folder, best, losses)


def run(words: list[Any]) -> str:
    """Print and run one residua command, and return its output; stop the demo if it fails."""
    print("$ residua " + " ".join(quoted(str(word)) for word in words), flush=True)
    shown = subprocess.run(
        [sys.executable, "-m", "residua", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    )
    print(shown.stdout, end="", flush=True)
    return shown.stdout


def quoted(word: str) -> str:
    """Return `word` as a user would type it in a shell."""
    return f"'{word}'" if "*" in word else word


def read_back(path: Path) -> None:
    """Read activations from the archive without the model, and find the text of a row."""
    print("\n# 4. Read back, without the model")
    archive = residua.open(path)
    values = np.asarray(archive["resid_post.5"][:4096], np.float32)
    row = int(np.linalg.norm(values, axis=-1).argmax())
    print('>>> archive = residua.open("' + str(path) + '")')
    print(f">>> archive\n{archive!r}")
    print(f'>>> archive["resid_post.5"]\n{archive["resid_post.5"]!r}')
    print(f'>>> archive["resid_post.5"][{row}][:4]\n{archive["resid_post.5"][row][:4]}')
    print(f">>> archive.text({row})          # the row with the largest norm of the first 4,096")
    print(repr(archive.text(row)))


def causal_check(path: Path, layer: int) -> list[tuple[float, float]]:
    """Ablate the heads of a layer, and return the losses of the first and second copy.

    There are three runs: without an ablation, without the heads of the layer below, and without those of the layer.
    """
    print("\n# 8. Do these heads repeat the text? Ablate the heads of a layer, and look at the loss of the second copy")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    archive = residua.open(path)
    examples = range(len(archive.examples))
    losses = []
    for site in (None, f"z.{layer - 1}", f"z.{layer}"):
        edits = [{"edit": "zero", "site": site}] if site else []
        print(f">>> with residua.replay(model, archive, examples=range({len(examples)}), edits={edits}) as run: ...")
        with residua.replay(model, archive, examples=examples, edits=edits) as run:
            per_token = run.losses
        first, second = torch.stack(per_token).mean(0).tensor_split(2)
        losses.append((first.mean().item(), second.mean().item()))
        print(f"loss of the first copy {first.mean():.2f} nats a token, of the second {second.mean():.2f}")
    return losses


def conclude_analysis(folder: Path, best: dict[str, Any], losses: list[tuple[float, float]]) -> None:
    """Print the results of the lens and the heads, and the paths of their plots."""
    report = pq.read_table(folder / "lens" / "report.parquet")
    before, after = (float(np.mean(report[name].to_numpy())) for name in ("kl_logit_lens", "kl"))
    print(
        f"\nTuned lens: {after:.2f} nats from the model's own prediction; the logit lens: {before:.2f} nats"
        f"\n  {(folder / 'lens' / 'report.png').resolve()}"
        f"\nInduction: head {best['head']} of layer {best['layer']} scores {best['induction']:.2f}; without the "
        f"heads of its layer, the loss of the second copy is {losses[-1][1]:.2f} nats a token, with them "
        f"{losses[0][1]:.2f}"
        f"\n  {(folder / 'repeats-heads' / 'induction.png').resolve()}"
        f"\nAll of it to look at: {(folder / 'page' / 'index.html').resolve()}"
    )


def conclude(path: Path, rate: str) -> None:
    """Print what was captured, how fast, how small, and where it is."""
    shown = subprocess.run(
        [sys.executable, "-m", "residua", "info", "--json", str(path)], check=True, capture_output=True, text=True
    )
    summary = json.loads(shown.stdout)
    per_token = summary["stored_bytes"] / summary["rows"]
    print(
        f"\nCaptured {len(summary['sites'])} sites of {summary['rows']:,} tokens"
        f"\n  at {rate}"
        f"\n  in {per_token:,.0f} bytes a token, {summary['ratio']:.2f} times smaller than the values themselves"
        f"\n  {path.resolve()}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
