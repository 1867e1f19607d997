"""Some thirty types of transformers, one of each kind, held against the model itself; and how the sweep ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import registries, sweep, table
from tests.models.findings import ATTENTION, Record

ROOT = Path(__file__).parents[2]
STREAM = ("resid_post",)
PARTS = ("attn_out", "mlp_out")
NO_PARTS = (*STREAM, *ATTENTION)
ALL = (*NO_PARTS, *PARTS)
EXPERTS = ("router_logits", "expert_index", "expert_weight", "routed_out")

SUBSET: dict[str, tuple[str, ...]] = {
    "causal/llama": (*ALL, "mlp_act"),  # in the table of architectures
    "causal/opt:postnorm": ALL,  # norms after the sums
    "causal/cohere2": ALL,  # side by side, sliding windows
    "causal/gpt_oss": (*STREAM, "q", "k", "v", "z", *PARTS),  # sinks
    "causal/qwen3_moe": (*ALL, *EXPERTS),  # a mixture of experts
    "causal/deepseek_v3": (*STREAM, *PARTS, *EXPERTS, "shared_out", "kv_latent"),  # latent attention
    "causal/lfm2": NO_PARTS,  # convolutions and attention
    "causal/nemotron_h": STREAM,  # one part a block
    "causal/rwkv": STREAM,  # a recurrence
    "causal/bloom": (*STREAM, *PARTS),  # attention in the model's own code
    "causal/gemma4_text": NO_PARTS,  # heads of several widths
    "causal/granite": NO_PARTS,  # parts times a factor
    "causal/gemma3n_text": (),  # several streams
    "causal/xlnet": (),  # no blocks of one stream
    "causal/diffllama": ALL,  # two attentions of the same queries
    "masked/modernbert": ALL,
    "masked/mobilebert": NO_PARTS,  # one part made of attention and MLP
    "masked/fnet": (*STREAM, "mixer_out", "mlp_out"),  # rows depend on padding
    "masked/albert": ("logits",),  # a block that runs several times
    "seq2seq/t5": (*ALL, "mlp_act"),
    "seq2seq/mvp": (*STREAM, *ATTENTION),  # attention to the source in the model's own code
    "seq2seq/fsmt": ("module",),  # stacks that do not run alone
    "vision/vit": (*ALL, "mlp_act"),
    "vision/yolos": ATTENTION,  # something is added between blocks
    "vision/swin": ("module",),  # patches are merged
    "vision/clip": STREAM,  # a text model beside a tower
    "vision-language/llava:equal": ALL,  # a vision tower as deep as the text model
    "vision-language/kosmos-2.5": ALL,  # no token that stands for a patch in its config
    "vision-language/mllama": ALL,  # a block that does not run without an image
    "audio/speech_to_text": STREAM,  # frames and tokens
    "audio/wav2vec2": ("module",),
}
"""Types, and the kinds that each must offer and prove, in the blocks and stacks that have them."""

OTHER_STATES = {
    "masked/albert": "logits only",
    "causal/xlnet": "logits only",
    **dict.fromkeys(("seq2seq/fsmt", "vision/swin", "audio/wav2vec2"), "modules only"),
}


pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of much that a tiny config has


@pytest.mark.parametrize("name", SUBSET)
def test_rows_are_those_of_the_model(name: str) -> None:
    registry, _, key = name.partition("/")
    record = sweep.examine(registry, key)
    assert (record.not_run, record.crashed, record.wrong) == ("", [], [])
    unproved = [kind for kind in SUBSET[name] if not (record.has(kind) or kind == "module" in record.proved)]
    assert unproved == []
    assert record.state == OTHER_STATES.get(name, "right")


ENDS = """
import os, sys, time
from pathlib import Path
from tests.models import sweep
ends = {"gpt2": lambda: os._exit(7), "bloom": lambda: time.sleep(60), "llama": lambda: 1 / 0}
sweep.build = lambda _registry, key: ends[key]()
sweep.TIME_LIMIT = 3.0
sweep.sweep([("causal", key) for key in ends], Path(sys.argv[1]), n_jobs=1)
"""


def test_a_crash_of_one_type_is_a_result(tmp_path: Path) -> None:
    """In a process of its own, as a sweep is: it forks, and what libraries and threads of a test run leave may die."""
    results = tmp_path / "found.jsonl"
    subprocess.run([sys.executable, "-c", ENDS, results], check=True, timeout=120, cwd=ROOT)
    found = {key: record for (_, key), record in sweep.known(results).items()}
    assert {key: record.state for key, record in found.items()} == {
        "gpt2": "crashed",
        "bloom": "crashed",
        "llama": "not run",
    }
    assert "7" in found["gpt2"].crashed[0]
    assert "3 s" in found["bloom"].crashed[0]
    assert "ZeroDivisionError" in found["llama"].not_run


def test_a_sweep_goes_on_where_it_was_and_compares_its_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def examined(registry: str, key: str) -> Record:
        seen.append(key)
        return Record(registry=registry, key=key, runs=True, n_blocks=2, offered={"resid_post": [0, 1]})

    monkeypatch.setattr(sweep, "examined_apart", examined)
    monkeypatch.setattr(sweep, "keys_of", lambda _registry: ["llama", "gpt2"])
    monkeypatch.setattr(sweep, "PAGE", tmp_path / "page.md")
    words = ["--registry", "causal", "--results", str(tmp_path / "found.jsonl")]
    assert sweep.main([*words, "--types", "llama"]) == 0
    assert sweep.main(words) == 0
    assert seen == ["llama", "gpt2"]
    page = (tmp_path / "page.md").read_text()
    assert "| `gpt2` | right | all, offered |" in page
    assert sweep.main([*words, "--check"]) == 0
    (tmp_path / "page.md").write_text(page.replace("`gpt2` | right", "`gpt2` | wrong"))
    assert sweep.main([*words, "--check"]) == 1
    assert "+ | `gpt2` | right" in capsys.readouterr().out


def test_lines_of_a_page_are_written_anew_and_counted() -> None:
    page = sweep.PAGE.read_text()
    assert table.renewed(page, []) == page
    lost = Record(registry="vision", key="vit", not_run="gone")
    new = Record(registry="vision", key="aaa", runs=True, n_blocks=1, offered={"resid_post": [0]})
    new.proved = {"resid_post": [0]}
    changed = table.renewed(page, [lost, new])
    assert "| `vit` | not run |" in changed
    assert changed.index("| `aaa` | right | all |") < changed.index("| `aimv2_vision_model`")
    before, after = (
        [line for line in each.splitlines() if line not in other.splitlines()]
        for each, other in ((page, changed), (changed, page))
    )
    assert len(before) == 2  # the numbers, and the line of vit
    assert len(after) == 3


def test_reasons_name_all_the_kinds_that_they_are_of() -> None:
    said = (
        "ToyModel (toy) lacks sites. q, k, v, pattern, z: q.0 of 'toy': toy.0 computes no attention. "
        "attn_out, decoder.mlp_out: attn_out.0 of 'toy': no stream is known; use module: sites, as 'module:toy'"
    )
    assert table.reasons(said) == [
        "q, k, v, pattern, z: q.0 of 'toy': toy.0 computes no attention",
        "attn_out, decoder.mlp_out: attn_out.0 of 'toy': no stream is known",
    ]


def test_every_registry_has_types_and_the_page_those_of_a_sweep() -> None:
    assert all(len(registries.keys_of(name)) > 15 for name in registries.REGISTRIES)
    page = sweep.PAGE.read_text()
    assert [
        name for name in registries.REGISTRIES if f"## {table.TITLES.get(name, name.capitalize())}" not in page
    ] == []
