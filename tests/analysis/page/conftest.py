"""A small archive with heads, a head, texts that look like markup, and the page of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

import residua
from residua.store.format.sidecars import AttentionSpec, LMHeadSpec, attention_to_json
from tests.analysis.rows_archive import write_rows
from tests.browser import Browser, Tab, chromium

HOSTILE = "</script><script>document.title='taken'</script>"
WORDS = [HOSTILE, "<img src=x onerror=alert(1)>", "&amp;&lt;b&gt;", "\u2028", "]]>", "'\"", " plain", "\n", "é", "«»"]
LENGTHS = (9, 4, 12, 7, 5, 10)
WIDTH, HEADS = 6, (4, 2)
SPEC = AttentionSpec(scale=0.4, causal=True, window=5)


class Made(NamedTuple):
    """An archive, its page, and the values that the archive was made of, float32, by site."""

    archive: Path
    page: Path
    values: dict[str, npt.NDArray[Any]]
    unembed: npt.NDArray[np.float32]
    vector: npt.NDArray[np.float64]


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(1)
    n_rows = sum(LENGTHS)
    shapes = {"resid_post.0": (WIDTH,), "resid_post.1": (WIDTH,), "q.1": (HEADS[0], 8), "k.1": (HEADS[1], 8)}
    values = {name: rng.standard_normal((n_rows, *shape)).astype(np.float32) for name, shape in shapes.items()}
    values["resid_post.0"] += 3
    unembed = rng.standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.decoder = Fuse()
    archive = write_rows(
        folder / "acts.zarr",
        LENGTHS,
        values,
        columns={"title": [f"{HOSTILE} {i}" for i in range(len(LENGTHS))], "n": list(range(len(LENGTHS)))},
        input_ids=[[(i + at) % len(WORDS) for at in range(length)] for i, length in enumerate(LENGTHS)],
        rows_per_shard=16,
        codec="raw",
        files={
            "tokenizer/tokenizer.json": tokenizer.to_str().encode(),
            "head/head.safetensors": save({"unembed.weight": unembed}),
            "head/head.json": LMHeadSpec(norm="none", dtype="float32").to_json(),
            "head/attention.json": attention_to_json({1: SPEC}),
        },
    )
    vector = rng.standard_normal(WIDTH)
    save_file(
        {"W_dec": np.stack([vector, -vector]), "W_enc": np.stack([vector, 2 * vector], 1)}, folder / "sae.safetensors"
    )
    residua.page(
        archive,
        folder / "page",
        directions=[
            "resid_post.1=channel:2",
            f"resid_post.1={folder}/sae.safetensors#W_dec[0]",
            "logit of plain:=resid_post.0=logit:6",
            ("</script>'\"", "q.1", np.ones(32)),
        ],
        k=3,
    )
    return Made(folder / "acts.zarr", folder / "page", values, unembed, vector)


def registered(page: Path, name: str) -> Any:
    """Return the value of a data file, as a browser would."""
    text = (page / "data" / f"{name}.js").read_text("ascii")
    head, tail = f'residua.register("{name}",', ");\n"
    assert text.startswith(head)
    assert text.endswith(tail)
    return json.loads(text.removeprefix(head).removesuffix(tail))


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="package")
def tab(browser: Browser) -> Tab:
    return browser.tab()
