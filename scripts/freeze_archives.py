"""Freeze one small archive for each codec preset in the current format: `python scripts/freeze_archives.py`.

Run it once for each new version of the format, never for a released one: `tests/fixtures/` must hold what that version
really wrote. The script also writes `digests.json`, the SHA-256 of every array's values as plain zarr-python reads
them. `tests/store/read/test_frozen.py` compares these digests with what later versions of Residua read.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import zarr
from transformers import LlamaConfig, LlamaForCausalLM

import residua
from residua.store.encoding.codecs import PRESETS
from residua.store.format.archive_metadata import FORMAT

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / f"format-{FORMAT}"


def plain_digest(archive: Path, node: str) -> str:
    """Return the SHA-256 of all values of an array, as zarr-python reads them."""
    array = zarr.open_array(str(archive / node), mode="r")
    return hashlib.sha256(np.ascontiguousarray(array[...]).tobytes()).hexdigest()


def freeze() -> dict[str, dict[str, str]]:
    """Capture one archive for each preset, and return the digests of their arrays."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=40, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(3, 50, length).tolist(), "label": str(length)} for length in (5, 17, 1, 9, 30)]
    digests = {}
    for preset in PRESETS:
        out = FOLDER / f"{preset}.archive"
        dtype = "float32" if preset.startswith("bitround") else "bfloat16"
        result = residua.capture_dataset(
            model, data, out=out, sites="resid_post.*,q.1,logits_top3", codec=preset, dtype=dtype, rows_per_shard=16
        )
        nodes = [spec.path for spec in result.archive.plan.arrays]
        digests[preset] = {node: plain_digest(out, node) for node in nodes}
    return digests


if __name__ == "__main__":
    if FOLDER.exists():
        raise SystemExit(f"{FOLDER} exists: archives of a format version are frozen once and never replaced")
    FOLDER.mkdir(parents=True)
    (FOLDER / "digests.json").write_text(json.dumps(freeze(), indent=1) + "\n")
    print(f"froze {len(PRESETS)} archives in {FOLDER}")
