"""Another checkout against this one, the same jobs in turns: `python benchmarks/versions.py --other FOLDER`.

Each run is a process of its own that imports Residua from one of the two checkouts, prepares the job, and measures only
the job: processor time of all its threads, kernel included. The jobs use public names only. The checkouts take turns in
going first. Ratios are taken within a round, this checkout over the other; 1.00 means that the two cost the same.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import machine, spread, table

HERE = Path(__file__).parents[1]
PREPARE = """
import sys, time
from pathlib import Path
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import residua
torch.set_num_threads(1)
work, model_folder = Path(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
small = AutoModelForCausalLM.from_pretrained(model_folder)
texts = [rng.integers(1, 1000, length).tolist() for length in rng.integers(64, 129, 300)]
config = dict(vocab_size=64, hidden_size=2048, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
wide = LlamaForCausalLM(LlamaConfig(**config)).train(False)
tokens = [rng.integers(1, 64, 128).tolist() for _ in range(64)]
def capture(out, model=small, data=texts, **options):
    return residua.capture_dataset(model, data, out=work / out, **options).archive
"""
JOBS = {
    "capture, raw": ("", "capture('a', sites='resid_post.*', codec='raw')"),
    "capture, fast": ("", "capture('a', sites='resid_post.*,q.3,attn_out.2', codec='fast')"),
    "write, wide rows, raw": ("", "capture('a', wide, tokens, sites='embed,resid_post.0', codec='raw', head=False)"),
    "write, wide rows, fast": ("", "capture('a', wide, tokens, sites='embed,resid_post.0', codec='fast', head=False)"),
    "scan": (
        "rows = capture('a', wide, tokens, sites='resid_post.0', codec='fast', head=False)['resid_post.0']",
        "[rows[start : start + 512].sum() for _ in range(4) for start in range(0, len(rows), 512)]",
    ),
    "4,096 random rows": (
        "rows = capture('a', wide, tokens, sites='resid_post.0', codec='fast', head=False)['resid_post.0']",
        "[rows[rng.integers(0, len(rows), 4096)].sum() for _ in range(4)]",
    ),
    "open, 300 examples": (
        "capture('a', sites='resid_post.*')",
        "[residua.open(work / 'a').n_rows for _ in range(30)]",
    ),
    "statistics": ("archive = capture('a', sites='resid_post.*')", "residua.stats(archive)"),
    "probe": ("archive = capture('a', sites='resid_post.2')", "residua.probe(archive, 'position > 20')"),
    "tuned lens": (
        "capture('a', sites='resid_post.*')",
        "residua.TunedLens.fit(work / 'a', sites='resid_post.*', out=work / 'lens')",
    ),
    "loader, one epoch": (
        "archive = capture('a', sites='resid_post.2')",
        "[batch['row'].sum() for batch in archive.loader('resid_post.2', batch_size=512, seed=0)]",
    ),
    "replay of an archive": (
        "archive = capture('a', sites='resid_post.*')\nedits = [{'edit': 'scale', 'site': 'attn_out.3', 'by': 0.5}]",
        "residua.replay_dataset(small, archive, out=work / 'b', at='resid_post.2', edits=edits)",
    ),
}


def seconds(checkout: Path, prepare: str, job: str) -> float:
    """Return the processor time of a job, in seconds, with Residua from a checkout."""
    code = f"{PREPARE}\n{prepare}\nstarted = time.process_time()\n{job}\nprint(time.process_time() - started)"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as work:
        words = [sys.executable, "-c", code, work, str(HERE / "models" / "pydoc-1m")]
        shown = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise SystemExit(f"{checkout}: {job}\n{shown.stderr[-3000:]}")
    return float(shown.stdout.split()[-1])


def report(other: Path, names: Sequence[str], rounds: int) -> str:
    """Run the named jobs from both checkouts in turns; return the table."""
    lines = []
    for name in names:
        prepare, job = JOBS[name]
        pairs = []
        for number in range(rounds):
            order = (other, HERE) if number % 2 else (HERE, other)
            found = {checkout: seconds(checkout, prepare, job) for checkout in order}
            pairs.append((found[other], found[HERE]))
        theirs, ours = zip(*pairs, strict=True)
        lines.append([name, spread(theirs), spread(ours), spread([new / old for old, new in pairs])])
        print(f"{name}: {lines[-1][-1]}", file=sys.stderr, flush=True)
    heads = ["job", "the other, CPU seconds", "this one, CPU seconds", "this one over the other"]
    packages = machine("torch", "transformers", "zarr", "numpy")
    checkouts = f"The other is commit {commit(other)}, this one {commit(HERE)}."
    return f"{checkouts} Median (least to greatest) of {rounds} rounds.\n{packages}\n\n{table(heads, lines)}\n"


def commit(checkout: Path) -> str:
    """Return the short name of the commit that a checkout is at."""
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument(
        "--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help="jobs (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each job from each checkout (default: 5)")
    parser.add_argument("--out", type=Path, help="file for the table (default: print it)")
    options = parser.parse_args()
    found = report(options.other.resolve(), options.jobs, options.rounds)
    options.out.write_text(found) if options.out else print(found)
