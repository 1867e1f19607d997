"""What `make demo` shows: a dataset goes into an archive, and comes back without the model.

    python examples/demo.py demo

Every step is a command or a few lines that you can type yourself; the demo prints them as it goes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pydoc_topics import write_topics

import residua

MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"


def main(folder: Path) -> None:
    """Run the demo in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset, archive = folder / "topics.jsonl", folder / "acts.zarr"
    shutil.rmtree(archive, ignore_errors=True)
    print(f"\n# A dataset: the {write_topics(dataset)} topics of Python's own documentation, in {dataset}")

    print("\n# 1. Capture. The residual stream after every block, and what attention adds in block 3")
    words = ["capture", "--model", MODEL, "--dataset", dataset, "--sites", "resid_post.*,attn_out.3"]
    words += ["--max-length", "128", "--dtype", "bfloat16", "--out", archive]
    rate = next(line for line in run(words).splitlines() if line.startswith("rate")).removeprefix("rate").strip()

    print("\n# 2. Look. Everything that is known of the archive")
    run(["info", archive])

    print("\n# 3. Verify. Every chunk is re-hashed")
    run(["verify", archive])

    read_back(archive)
    conclude(archive, rate)


def run(words: list[Any]) -> str:
    """Print and run one residua command, and return what it printed; stop the demo if it fails."""
    print("$ residua " + " ".join(quoted(str(word)) for word in words), flush=True)
    shown = subprocess.run(
        [sys.executable, "-m", "residua", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    )
    print(shown.stdout, end="", flush=True)
    return shown.stdout


def quoted(word: str) -> str:
    """Return `word` as one would type it in a shell."""
    return f"'{word}'" if "*" in word else word


def read_back(path: Path) -> None:
    """Read activations of the archive without the model, and find their text."""
    print("\n# 4. Read back, without the model")
    archive = residua.open(path)
    values = np.asarray(archive["resid_post.5"][:4096], np.float32)
    row = int(np.linalg.norm(values, axis=-1).argmax())
    print('>>> archive = residua.open("' + str(path) + '")')
    print(f">>> archive\n{archive!r}")
    print(f'>>> archive["resid_post.5"]\n{archive["resid_post.5"]!r}')
    print(f'>>> archive["resid_post.5"][{row}][:4]\n{archive["resid_post.5"][row][:4]}')
    print(f">>> archive.text({row})          # where the residual stream is longest, of the first 4,096 rows")
    print(repr(archive.text(row)))


def conclude(path: Path, rate: str) -> None:
    """Say what was captured, how fast, how small, and where it lies."""
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
