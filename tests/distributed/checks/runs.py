"""`residua.run` on a distributed model against transformers' hidden states and one process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import CaptureError
from residua.store.verification.verify import verify
from tests.distributed.checks.jobs import BOUND, Load, sharded
from tests.distributed.layouts.case import relative_error
from tests.distributed.layouts.single_process import vector
from tests.models.tiny import SPLIT

PROMPTS = [[3, 9, 27, 81, 5], [7, 11, 13], [2, 4, 8, 16, 32, 64, 1, 1]]
SITES = ("resid_post.0", "resid_post.1", "z.2", "mlp_act.2")


def prompts_on_spread_models(load: Load) -> None:
    """Tensor parallel, pipeline and FSDP2, each over two ranks: sites, logits, edits and generated tokens."""
    bare = SPLIT["llama"]()
    layouts: dict[str, Callable[[], Any]] = {
        "tp": lambda: load("llama", tp_size=2),
        "pp": lambda: load("llama", pp_size=2),
        "fsdp": lambda: sharded(SPLIT["llama"]()),
    }
    edits: list[dict[str, Any]] = [
        {"edit": "add", "site": "resid_post.0", "vector": vector(bare.config.hidden_size), "positions": [1]},
        {"edit": "swap", "site": "resid_post.1", "source": 0, "align": "end", "examples": [2], "positions": [-1]},
    ]
    wanted = residua.run(bare, PROMPTS, sites=SITES, edits=edits)
    for layout, make in layouts.items():
        model = make()
        equals_hidden_states(layout, residua.run(model, PROMPTS, sites=SITES), bare)
        found = residua.run(model, PROMPTS, sites=SITES, edits=edits)
        for number in range(len(PROMPTS)):
            assert relative_error(found.logits[number], wanted.logits[number]) <= BOUND, (layout, number)
            for site in SITES:
                here = rows_of(found, site, number)
                assert here is None or relative_error(here, wanted[site][number]) <= BOUND, (layout, site)
        met_somewhere(layout, found)
        if layout == "tp":
            generates_and_is_saved(model, bare)


def equals_hidden_states(layout: str, run: Any, bare: PreTrainedModel) -> None:
    for number, ids in enumerate(PROMPTS):
        with torch.no_grad():
            alone = bare(torch.tensor([ids]), output_hidden_states=True)
        assert relative_error(run.logits[number], alone.logits[0]) <= BOUND, (layout, "logits", number)
        for block in (0, 1):
            here = rows_of(run, f"resid_post.{block}", number)
            assert here is None or relative_error(here, alone.hidden_states[block + 1][0]) <= BOUND, (layout, block)


def rows_of(run: Any, site: str, number: int) -> torch.Tensor | None:
    """The rows of a prompt at a site; None where another process has them."""
    try:
        rows: torch.Tensor = run[site][number]
    except CaptureError as error:
        assert "another process" in str(error)  # noqa: PT017  # only where blocks do not run
        return None
    return rows


def met_somewhere(layout: str, run: Any) -> None:
    here = {site for site in SITES if rows_of(run, site, 0) is not None}
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    assert set().union(*everyone) == set(SITES), f"{layout}: some site was met nowhere"


def generates_and_is_saved(model: PreTrainedModel, bare: PreTrainedModel) -> None:
    """Both ranks get the tokens of one process; the archive is written once, with the rows of one process."""
    run = residua.run(model, PROMPTS, sites=SITES)
    written = run.generate(max_new_tokens=3)
    for ids, tokens in zip(PROMPTS, written, strict=True):
        alone: Any = bare.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        assert tokens[-3:] == alone[0, len(ids) :].tolist()
    archive = run.save(Path(sys.argv[1]) / "saved-run.zarr")
    assert verify(archive.path).problems == []
    wanted = residua.run(bare, PROMPTS, sites=SITES)
    for number in range(len(PROMPTS)):
        example = archive.example(number)
        for site in SITES:
            assert relative_error(torch.from_numpy(example[site]), wanted[site][number]) <= BOUND, site


CHECKS = (prompts_on_spread_models,)
