"""Every edit against a plain hook on the full model, on every architecture, and against its closed form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import residua
from residua.analysis.lens.checkpoint import LensConfig, Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import load_lm_head
from residua.capture.sites.anatomy import anatomy_of
from residua.capture.sites.names_to_modules import model_sites
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive
from tests.capture.manual_hooks import hooked
from tests.capture.replay_samples import EVEN, LENGTHS, PADDED, captured, model_of, run_in_full, stored
from tests.models.tiny import TINY

SITE, WIDTH = "resid_post.1", 32
HERE = slice(2, 5)  # positions that are edited
RNG = np.random.default_rng(11)
VECTOR = RNG.standard_normal(WIDTH)
BASIS = RNG.standard_normal((2, WIDTH))
WEIGHT, BIAS = RNG.standard_normal((WIDTH, WIDTH)) / WIDTH, RNG.standard_normal(WIDTH)
CHANNELS = [0, 5, 31]

ByHand = Callable[[Tensor, int], Tensor]
"""From the rows of an example at the edited positions, (3, width), to their new values."""


def edits_and_hooks(archive: Archive, other: Archive, folder: Path) -> list[tuple[dict[str, Any], ByHand]]:
    labels = np.array(archive.examples["label"].to_pylist())
    of_example = np.asarray(archive.rows.example, np.int64)
    rows = np.asarray(archive[SITE], np.float64)
    vector = torch.from_numpy(VECTOR).float()
    orthonormal = torch.from_numpy(np.linalg.qr(BASIS.T)[0]).float()
    overlay = residua.overlay(archive, folder / "overlay", sites=SITE)
    written = archive.example_table.rows(3)[0] + 3
    overlay.write(SITE, [written], VECTOR[None])
    np.save(folder / "basis.npy", BASIS)
    (folder / "lens").mkdir()
    linear = {"2.weight": torch.from_numpy(WEIGHT).float(), "2.bias": torch.from_numpy(BIAS).float()}
    torch.save(linear, folder / "lens" / "params.pt")

    def class_mean(_x: Tensor, example: int) -> Tensor:
        return torch.from_numpy(rows[labels[of_example] == labels[example]].mean(0)).float().expand(3, WIDTH)

    def swapped(_x: Tensor, example: int) -> Tensor:
        shift = LENGTHS[0] - LENGTHS[example]
        return stored(archive, SITE, 0)[HERE.start + shift : HERE.stop + shift]

    def one_row(x: Tensor, example: int) -> Tensor:
        return torch.stack([x[0], vector if example == 3 else x[1], x[2]])

    def in_channels(x: Tensor, _example: int) -> Tensor:
        x[:, CHANNELS] = x[:, CHANNELS] * -2.5
        return x

    def projected(x: Tensor, _example: int) -> Tensor:
        return x - (x @ orthonormal) @ orthonormal.T

    return [
        ({"edit": "zero"}, lambda x, _: torch.zeros_like(x)),
        ({"edit": "mean"}, lambda x, _: torch.from_numpy(rows.mean(0)).float().expand_as(x)),
        ({"edit": "mean", "column": "label"}, class_mean),
        ({"edit": "mean", "archive": other.path}, lambda x, _: torch.from_numpy(2 * rows.mean(0)).float().expand_as(x)),
        ({"edit": "add", "vector": VECTOR, "scale": 3.0}, lambda x, _: x + torch.from_numpy(3 * VECTOR).float()),
        ({"edit": "set", "to": VECTOR}, lambda x, _: vector.expand_as(x)),
        ({"edit": "set", "to": -1.5}, lambda x, _: torch.full_like(x, -1.5)),
        ({"edit": "scale", "by": -2.5, "channels": CHANNELS}, in_channels),
        ({"edit": "project_out", "directions": BASIS}, projected),
        ({"edit": "swap", "source": 0, "align": "end"}, swapped),
        ({"edit": "swap", "source": {3: 1}, "align": [[2, 0], [4, 9]]}, swapped_in_pairs(archive)),
        ({"edit": "lens", "lens": folder / "lens"}, lensed),
        ({"edit": "overlay", "overlay": overlay.path}, one_row),
        ({"edit": "function", "function": lambda _site, x: x.tanh()}, lambda x, _: x.tanh()),
    ]


def lensed(x: Tensor, _example: int) -> Tensor:
    return x + x @ torch.from_numpy(WEIGHT).float().T + torch.from_numpy(BIAS).float()


def swapped_in_pairs(archive: Archive) -> ByHand:
    def swapped(x: Tensor, example: int) -> Tensor:
        there = stored(archive, SITE, 1)
        return torch.stack([there[0], x[1], there[9]]) if example == 3 else x

    return swapped


def by_hand(change: ByHand) -> Callable[..., Any]:
    """Return a forward hook that changes some rows of a block's output in place, as users write it."""

    def hook(_module: nn.Module, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        for place, example in enumerate(PADDED):
            hidden[place, HERE] = change(hidden[place, HERE].clone(), example)

    return hook


def doubled(archive: Archive, out: Path, model: nn.Module) -> Archive:
    """Return the same archive with rows twice as large."""
    with residua.tap(model, SITE, lambda _site, x: 2 * x):
        return captured(model, out, sites=SITE)  # type: ignore[arg-type]  # a model all the same


@pytest.mark.parametrize("name", TINY)
def test_every_edit_does_what_a_plain_hook_does(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    archive = captured(model, tmp_path / "a", sites=f"resid_post.0,{SITE}")
    anatomy = anatomy_of(model)
    assert anatomy is not None
    plain, is_token = run_in_full(model, archive, PADDED)
    for edit, change in edits_and_hooks(archive, doubled(archive, tmp_path / "b", model), tmp_path):
        with hooked(anatomy.modules[anatomy.blocks[1]], by_hand(change)):
            expected, _ = run_in_full(model, archive, PADDED)
        assert not torch.equal(expected, plain), f"{edit} changes nothing, so this tests nothing"
        options = {**edit, "site": SITE, "positions": "2:5"}
        with residua.replay(model, archive, examples=PADDED, at="resid_post.0", edits=[options]) as run:
            for place in range(len(PADDED)):
                wanted = expected[place][is_token[place]]
                difference = (run.logits[place] - wanted).abs().max() / wanted.abs().max()
                assert difference <= (1e-5 if edit["edit"] in ("project_out", "lens") else 0), edit


Given = tuple[Any, Archive]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Given:
    model = model_of("llama")
    return model, captured(model, tmp_path_factory.mktemp("llama") / "a", sites="resid_post.*,z.*,q.2,final,logits")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("name", "dtype"), [(name, DTYPES[i % 3]) for i, name in enumerate(TINY)])
def test_edits_that_change_nothing_change_no_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(name, dtype)
    infos = model_sites(model).values()
    sites = [info.name for info in infos if info.site.kind != "pattern" and info.dtype != "int64"]
    archive = captured(model, tmp_path / "a", sites=",".join(sites))
    overlay = residua.overlay(archive, tmp_path / "overlay", sites="z.1")
    partners = {example: example for example in range(len(LENGTHS))}
    nothing: list[dict[str, Any]] = [
        {"edit": "scale", "by": 1},
        {"edit": "noise", "std": 0},
        {"edit": "set", "to": "stored"},
        {"edit": "swap", "source": partners, "align": "end"},
    ]
    everywhere = [{**edit, "site": sites} for edit in nothing]
    everywhere.append({"edit": "overlay", "site": "z.1", "overlay": overlay.path})
    for site in sites:
        width = archive.plan.site(site).row_shape[-1]
        everywhere += [{"edit": "add", "site": site, "vector": np.ones(width), "scale": by} for by in (0.0, -0.0)]
    for examples in (EVEN, PADDED):
        with residua.replay(model, archive, examples=examples, edits=everywhere) as run:
            for place, example in enumerate(examples):
                assert torch.equal(run.logits[place], stored(archive, "logits", example))


def test_negative_zeros_stay_when_nothing_is_added(llama: Given) -> None:
    model, archive = llama
    edits: list[dict[str, Any]] = [
        {"edit": "set", "site": "resid_post.1", "to": -0.0},
        {"edit": "add", "site": "resid_post.1", "vector": [0.0] * 31 + [1.0]},
    ]
    with residua.replay(model, archive, examples=EVEN, at="resid_post.0", edits=edits, keep="resid_post.1") as run:
        rows = run["resid_post.1"][0]
    assert torch.signbit(rows[:, :31]).all()
    assert (rows[:, 31] == 1).all()


def test_a_vector_at_the_last_layer_gives_the_lm_head_of_the_sum(llama: Given) -> None:
    """The expected logits are the final norm and the unembedding in float64, from the weights."""
    model, archive = llama
    steering = {"edit": "add", "site": "final", "vector": VECTOR, "scale": 4.0}
    with residua.replay(model, archive, examples=EVEN, at="final", edits=[steering]) as run:
        assert run.skipped_blocks == 3
        for place, example in enumerate(EVEN):
            hidden = stored(archive, "final", example).double() + 4 * torch.from_numpy(VECTOR)
            scale = (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            wanted = (hidden * scale * model.model.norm.weight.double()) @ model.lm_head.weight.double().T
            torch.testing.assert_close(run.logits[place].double(), wanted, rtol=1e-5, atol=1e-5)


def test_projected_out_directions_are_gone(llama: Given) -> None:
    model, archive = llama
    removed = {"edit": "project_out", "site": "resid_post.1", "directions": [*BASIS, BASIS[0] - 2 * BASIS[1]]}
    keep = ["resid_post.1"]
    with residua.replay(model, archive, examples=EVEN, at="resid_post.1", edits=[removed], keep=keep) as run:
        rows = run["resid_post.1"][0].double().numpy()
    before = stored(archive, "resid_post.1", 0).double().numpy()
    assert np.abs(rows @ BASIS.T).max() < 1e-4 * np.abs(before @ BASIS.T).max()
    rest = np.linalg.svd(BASIS)[2][2:]
    np.testing.assert_allclose(rows @ rest.T, before @ rest.T, rtol=0, atol=1e-4)


def test_noise_follows_from_seed_site_and_token_alone(llama: Given) -> None:
    model, archive = llama

    def drawn(examples: list[int], seed: int, site: str = "resid_post.1") -> list[Tensor]:
        noise = {"edit": "noise", "site": site, "std": 0.5, "seed": seed}
        with residua.replay(model, archive, examples=examples, at=site, edits=[noise], keep=site) as run:
            return [run[site][i] - stored(archive, site, example) for i, example in enumerate(examples)]

    first = drawn([0, 1, 2], 3)
    alone = drawn([2], 3)
    torch.testing.assert_close(alone[0], first[2], rtol=0, atol=1e-5)
    everything = torch.cat(first)
    assert abs(everything.std() - 0.5) < 0.03
    assert abs(everything.mean()) < 0.05
    assert not torch.allclose(drawn([2], 4)[0], alone[0], atol=0.1)
    assert not torch.allclose(drawn([2], 3, "resid_post.2")[0], alone[0], atol=0.1)
    assert abs(np.corrcoef(first[0].flatten(), first[1].flatten())[0, 1]) < 0.2


def test_a_trained_lens_is_what_the_edit_applies(llama: Given, tmp_path: Path) -> None:
    model, archive = llama
    translators = {2: Translator(torch.from_numpy(WEIGHT).float(), torch.from_numpy(BIAS).float())}
    config = LensConfig(base_model_name_or_path="", d_model=WIDTH, num_hidden_layers=3)
    lens = TunedLens(load_lm_head(archive.path / "head"), translators, config)
    lens.save(tmp_path / "lens")
    edit = {"edit": "lens", "site": "resid_post.1", "lens": tmp_path / "lens"}
    with residua.replay(model, archive, examples=EVEN, at="resid_post.1", edits=[edit], keep="resid_post.1") as run:
        wanted = lens.apply("resid_post.1", stored(archive, "resid_post.1", 0))
        torch.testing.assert_close(run["resid_post.1"][0], wanted, rtol=1e-5, atol=1e-5)
    for site, words in (("resid_post.0", "was not trained at"), ("final", "final.*resid_pre or resid_post")):
        asked = pytest.raises(PlanError, match=words)
        with asked, residua.replay(model, archive, examples=EVEN, edits=[{**edit, "site": site}]):
            pass


def test_heads_are_ablated_one_by_one(llama: Given) -> None:
    """Compare with the output projection without the columns of those heads."""
    model, archive = llama
    edit = {"edit": "zero", "site": "z.1", "heads": [0, 3]}
    with residua.replay(model, archive, examples=EVEN, at="resid_post.0", edits=[edit], keep="attn_out.1") as run:
        z = stored(archive, "z.1", 0).double()
        z[:, [0, 3]] = 0
        wanted = z.flatten(1) @ model.model.layers[1].self_attn.o_proj.weight.double().T
        torch.testing.assert_close(run["attn_out.1"][0].double(), wanted, rtol=1e-5, atol=1e-5)


def test_edits_of_one_site_apply_in_their_order(llama: Given) -> None:
    model, archive = llama
    doubling: dict[str, Any] = {"edit": "scale", "site": "final", "by": 2}
    adding: dict[str, Any] = {"edit": "add", "site": "final", "vector": VECTOR}
    rows = stored(archive, "final", 0)
    vector = torch.from_numpy(VECTOR).float()
    for edits, wanted in (([doubling, adding], 2 * rows + vector), ([adding, doubling], 2 * (rows + vector))):
        with residua.replay(model, archive, examples=EVEN, at="final", edits=edits, keep="final") as run:
            torch.testing.assert_close(run["final"][0], wanted)


def changed(llama: Given, run_with: list[int], **choice: Any) -> list[list[int]]:
    """Return, for each example, the positions whose rows a zero at `final` changes."""
    model, archive = llama
    edit = {"edit": "zero", "site": "final", **choice}
    with residua.replay(model, archive, examples=run_with, at="final", edits=[edit], keep="final") as run:
        return [torch.nonzero((rows == 0).all(-1)).flatten().tolist() for rows in run["final"]]


def test_edits_reach_the_rows_that_were_chosen_and_no_others(llama: Given) -> None:
    archive = llama[1]
    first = archive.example_table.rows(3)[0]
    token = int(archive.example_table.tokens(2)[5])
    at = [i for i, other in enumerate(archive.example_table.tokens(2).tolist()) if other == token]
    assert changed(llama, [3, 2], examples=[2], positions=[0, -1]) == [[], [0, 6]]
    assert changed(llama, [3, 2], positions="-2:") == [[9, 10], [5, 6]]
    assert changed(llama, [3, 2], positions=[10]) == [[10], []]
    assert changed(llama, [3, 2], rows=[first + 4, first + 6]) == [[4, 6], []]
    assert changed(llama, [3, 2], where={"label": "b"}) == [list(range(11)), []]
    assert changed(llama, [2], tokens=[token]) == [at]
    assert changed(llama, [3, 2], where={"label": ["a", "b"]}, positions="1:3", examples=[3, 4]) == [[1, 2], []]
