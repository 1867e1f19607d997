"""Batches as trainers of other packages ask for them, in short trainings: trainSAE, OpenMOSS, saev, crosscoders."""

import json
import pickle
import sys
import warnings
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import residua
from residua.analysis.loader import feed as feed_module
from residua.analysis.loader.dictionary_learning import for_train_sae
from residua.analysis.loader.openmoss import for_openmoss
from residua.analysis.loader.paired import PairedRows
from residua.analysis.loader.sae_lens import for_multi_sae_lens, for_sae_lens
from residua.analysis.loader.saev import for_saev
from residua.store.base.errors import AnalysisError, MissingPackageError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows
from tests.analysis.trained_archive import N_ROWS, NARROW, WIDE, make_trained
from tests.pages import blocks, run

SIZE, WHERE = 64, "position > 0"
PER_EPOCH = N_ROWS * 9 // 10 // SIZE


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_trained(tmp_path_factory.mktemp("trainers") / "a.zarr")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return an archive of another model over the same tokens, stored in half precision."""
    return make_trained(tmp_path_factory.mktemp("trainers") / "b.zarr", seed=1, dtype="float16")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages whose contract a loop here follows be there."""
    for name in ("dictionary_learning", "llamascopium"):
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))


def training(archive: Archive, sites: Any = WIDE, **settings: Any) -> Any:
    given = {"batch_size": SIZE, "seed": 2, "where": WHERE, "drop_last": True, **settings}
    return archive.loader(sites, **given)


def learned(forward: nn.Module, batches: Any, steps: int) -> list[float]:
    """Train on batches as they come; return the losses."""
    optimizer, losses = torch.optim.Adam(forward.parameters(), lr=1e-2), []
    for batch in islice(batches, steps):
        loss = (forward(batch) - batch).pow(2).mean() / batch.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Crosscoder(nn.Module):
    """Latents shared by all sites or models of a row: (batch, sites, width) in and out."""

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(sites * width, 64), nn.Linear(64, sites * width)

    def forward(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(1).float()
        decoded: Tensor = self.decoder(torch.relu(self.encoder(flat)))
        return decoded.reshape(rows.shape)


@pytest.fixture
def train_sae() -> Any:
    """Return dictionary_learning's modules; of nnsight, which they import and do not use here, a name is enough."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if find_spec("nnsight") is None:
            stub: Any = ModuleType("nnsight")
            stub.LanguageModel = object
            patch.setitem(sys.modules, "nnsight", stub)
        package: Any = pytest.importorskip("dictionary_learning.training", exc_type=ImportError)
        return package, pytest.importorskip("dictionary_learning.trainers.top_k")


def test_train_sae_trains(archive: Archive, tmp_path: Path, train_sae: Any) -> None:
    package, top_k = train_sae
    steps = 60
    config = {"trainer": top_k.TopKTrainer, "steps": steps, "activation_dim": 16, "dict_size": 64, "k": 3, "layer": 0}
    config |= {"lm_name": "none", "warmup_steps": 5, "seed": 0, "device": "cpu", "lr": 1e-2}
    feed = for_train_sae(training(archive, normalise="mean_norm", epochs=None), steps=steps)
    package.trainSAE(feed, [config], steps=steps, save_dir=str(tmp_path), device="cpu")
    state = feed.state_dict()
    assert state["passed"] * PER_EPOCH + state["taken"] == steps  # none was taken that it did not train on
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
    assert saved["buffer"]["residua"]["plan"] == archive.plan.digest
    autoencoder = top_k.AutoEncoderTopK.from_pretrained(str(tmp_path / "trainer_0" / "ae.pt"), k=3, device="cpu")
    factor = feed.loader.normalisation[WIDE].factor.item()
    rows = torch.from_numpy(archive[WIDE][np.flatnonzero(np.arange(N_ROWS) % 10 > 0)])
    with torch.no_grad():
        found = autoencoder(rows * factor) / factor
    assert 1 - (found - rows).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum() > 0.6


@pytest.mark.usefixtures("installed")
def test_a_loop_like_train_sae_goes_on_after_a_stop(archive: Archive) -> None:
    def loop(data: Any, steps: int) -> list[Tensor]:
        found = []
        for step, act in enumerate(data):
            if step >= steps:
                break
            found.append(act)
        return found

    expected = loop(for_train_sae(training(archive, epochs=None)), 50)
    feed = for_train_sae(training(archive, epochs=None), steps=30)
    first = loop(feed, 30)
    resumed = for_train_sae(training(archive, epochs=None), steps=20)
    resumed.load_state_dict(json.loads(json.dumps(feed.state_dict())))
    for one, two in zip([*first, *loop(resumed, 20)], expected, strict=True):
        assert torch.equal(one, two)
    assert len(loop(feed, 30)) == 30  # each iteration is one training


@pytest.mark.usefixtures("installed")
def test_crosscoders_learn_from_sites_and_from_two_models(archive: Archive, other: Archive, tmp_path: Path) -> None:
    torch.manual_seed(0)
    normal = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    same = write_rows(tmp_path / "c.zarr", [10] * 20, {f"resid_mid.{layer}": normal for layer in range(3)})
    sites = for_train_sae(same.loader("*", batch_size=40, epochs=None))
    losses = learned(Crosscoder(3, 16), sites, 60)
    assert losses[-1] < losses[0] / 2
    pair = PairedRows(archive, str(other.path), WIDE)
    feed = for_train_sae(pair.loader(batch_size=SIZE, epochs=None, where=WHERE, normalise="mean_norm"))
    assert next(feed).shape == (SIZE, 2, 16)
    losses = learned(Crosscoder(2, 16), feed, 60)
    assert losses[-1] < losses[0] / 2
    with pytest.raises(AnalysisError, match="different shapes"):
        for_train_sae(archive.loader([WIDE, NARROW], batch_size=4, epochs=None))


def test_a_pair_has_the_rows_of_both_archives(archive: Archive, other: Archive) -> None:
    pair = PairedRows(archive, other, WIDE)
    expected = np.stack([archive[WIDE][:], other[WIDE][:]], axis=1)
    assert len(pair) == N_ROWS
    np.testing.assert_array_equal(pair[3], expected[3])
    np.testing.assert_array_equal(pair[5:1000:7], expected[5:1000:7])
    np.testing.assert_array_equal(pair[np.array([9, 2])], expected[[9, 2]])
    seen = []
    for batch in DataLoader(pair, batch_size=100, shuffle=True):
        assert batch.shape == (100, 2, 16)
        seen.append(batch)
    assert torch.cat(seen).sum(dtype=torch.float64) == pytest.approx(expected.sum(dtype=np.float64), rel=1e-6)
    sent = pickle.loads(pickle.dumps(pair))  # noqa: S301  # our own, as spawned workers get it
    assert torch.equal(sent[[4, 7]], pair[[4, 7]])
    loader = pair.loader(batch_size=100, columns=["token"], where="example < 30")
    for batch in pickle.loads(pickle.dumps(loader)):  # noqa: S301  # our own
        np.testing.assert_array_equal(batch[WIDE], expected[batch["row"]])
        np.testing.assert_array_equal(batch["token"], other.rows.token[batch["row"].numpy()])


@pytest.mark.parametrize("kind", ["mean_norm", "standardise", "whiten"])
def test_each_model_of_a_pair_is_normalised_by_itself(archive: Archive, other: Archive, kind: Any) -> None:
    pair = PairedRows(archive, other, WIDE).loader(batch_size=N_ROWS, where=WHERE, normalise=kind)
    (batch,) = pair
    for number, one in enumerate((archive, other)):
        alone = one.loader(WIDE, batch_size=N_ROWS, where=WHERE, normalise=kind)
        found = alone.normalisation[WIDE].apply(one[WIDE].torch(batch["row"].numpy()))
        torch.testing.assert_close(batch[WIDE][:, number], found, rtol=1e-4, atol=1e-4)


def test_pairs_of_other_tokens_are_refused(archive: Archive, tmp_path: Path) -> None:
    def made(name: str, lengths: list[int], ids: list[list[int]] | None = None, width: int = 4) -> Archive:
        values = np.zeros((sum(lengths), width), np.float32)
        return write_rows(tmp_path / name, lengths, {WIDE: values}, input_ids=ids, rows_per_shard=8)

    ids = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    base = made("a", [4, 4, 4], ids)
    PairedRows(base, made("b", [4, 4, 4], ids), WIDE)
    with pytest.raises(AnalysisError, match=r"row 10 \(example 2, position 2\).*token 11 .* 42"):
        PairedRows(base, made("c", [4, 4, 4], [*ids[:2], [9, 10, 42, 12]]), WIDE)
    with pytest.raises(AnalysisError, match=r"row 4 .*example 1 .* 0"):
        PairedRows(base, made("d", [6, 2, 4]), WIDE)
    with pytest.raises(AnalysisError, match="12 and 8 rows"):
        PairedRows(base, made("e", [4, 4], ids[:2]), WIDE)
    with pytest.raises(AnalysisError, match=r"\(4,\).*\(6,\)"):
        PairedRows(base, made("f", [4, 4, 4], ids, width=6), WIDE)
    with pytest.raises(AnalysisError, match="one site"):
        PairedRows(archive, archive, "*")
    with pytest.raises(UnknownSiteError):
        PairedRows(base, base, "resid_post.9")


@pytest.mark.usefixtures("installed")
def test_openmoss_streams(archive: Archive) -> None:
    """Its trainer looks at one batch of the stream, and then trains on the stream, to its end if it has one."""
    hooks = {WIDE: "blocks.0.hook_resid_post", NARROW: "blocks.0.hook_mlp_out"}
    settings: Any = {"sites": [WIDE, NARROW], "columns": ["token", "example"]}

    def fit(stream: Any, steps: int) -> list[list[int]]:
        assert next(iter(stream))["mask"].all()
        found, batches = [], iter(stream)
        batch = next(batches)
        while True:
            assert {*batch} == {*hooks.values(), "tokens", "mask"}
            assert batch["mask"].sum() == batch["tokens"].numel() == len(batch[hooks[WIDE]])
            found.append(batch["tokens"].tolist())
            if len(found) >= steps:
                return found
            try:
                batch = next(batches)
            except StopIteration:
                return found

    expected = [batch["token"].tolist() for batch in training(archive, **settings, epochs=2)]
    assert fit(for_openmoss(training(archive, **settings, epochs=2), hooks), 1000) == expected
    feed = for_openmoss(training(archive, **settings, epochs=None), hooks)
    assert fit(feed, 20) == expected[:20]
    state = json.loads(json.dumps(feed.state_dict()))
    resumed = for_openmoss(training(archive, **settings, epochs=None), hooks)
    resumed.load_state_dict(state)
    assert fit(resumed, 10) == expected[20:30]
    chosen = np.flatnonzero(np.arange(N_ROWS) % 10 > 0)
    for site, hook in hooks.items():
        norm = np.linalg.norm(archive[site][chosen].astype(np.float64), axis=1).mean()
        assert feed.mean_norms()[hook] == pytest.approx(norm)
    with pytest.raises(AnalysisError, match=r"columns=\['token'\]"):
        for_openmoss(training(archive))
    with pytest.raises(AnalysisError, match=r"hooks= names resid_post\.7"):
        for_openmoss(training(archive, columns=["token"]), {"resid_post.7": "x"})
    with pytest.raises(AnalysisError, match="two sites one name"):
        for_openmoss(training(archive, **settings), {WIDE: NARROW})


def test_openmoss_trains(archive: Archive, tmp_path: Path) -> None:
    """The package's own trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainers: Any = pytest.importorskip("llamascopium.trainer", reason="pip install llamascopium")
        models: Any = pytest.importorskip("llamascopium.models.sae")
    hook, steps = "blocks.0.hook_resid_post", 80
    loader = archive.loader(WIDE, batch_size=SIZE, epochs=None, columns=["token"], where=WHERE)
    feed = for_openmoss(loader, {WIDE: hook})
    settings = {"d_model": 16, "expansion_factor": 4, "act_fn": "topk", "top_k": 3, "device": "cpu"}
    sae = models.SparseAutoEncoder(models.SAEConfig(hook_point_in=hook, hook_point_out=hook, **settings))
    torch.manual_seed(0)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.2)
    sae.set_dataset_average_activation_norm(feed.mean_norms())
    given: dict[str, Any] = {
        "lr": 1e-2,
        "lr_warm_up_steps": 5,
        "initial_k": 3,
        "k_warmup_steps": 0,
        "l1_coefficient": None,
    }
    given |= {"amp_dtype": torch.bfloat16, "n_checkpoints": 0, "exp_result_path": str(tmp_path)}
    trainers.Trainer(trainers.TrainerConfig(total_training_tokens=steps * SIZE, **given)).fit(sae, feed)
    state = feed.state_dict()
    assert state["passed"] * loader.batches_per_epoch + state["taken"] == steps
    rows = torch.from_numpy(archive[WIDE][np.flatnonzero(np.arange(N_ROWS) % 10 > 0)])
    scaled = sae.normalize_activations({hook: rows})[hook]
    with torch.no_grad():
        found = sae(scaled)
    assert 1 - (found - scaled).pow(2).sum() / (scaled - scaled.mean(0)).pow(2).sum() > 0.5


def test_saev_batches(archive: Archive, other: Archive) -> None:
    """saev limits a loader to a number of samples, and begins it anew until it has them."""
    columns = ["example", "position"]
    feed = for_saev(other.loader(WIDE, batch_size=SIZE, columns=columns, where=WHERE))
    assert (feed.batch_size, feed.drop_last, feed.n_samples) == (SIZE, False, N_ROWS * 9 // 10)
    assert feed.n_batches == len(feed) == -(-feed.n_samples // SIZE)
    epochs = [[*feed] for _ in range(2)]
    raw = other[WIDE][:]
    for epoch in epochs:
        for batch in epoch:
            assert {name: each.dtype for name, each in batch.items()} == {
                "act": torch.float32,
                "example_idx": torch.int32,
                "token_idx": torch.int32,
            }
            rows = batch["example_idx"].long() * 10 + batch["token_idx"]
            np.testing.assert_array_equal(batch["act"], raw[rows])
        assert sum(len(batch["act"]) for batch in epoch) == feed.n_samples
    assert not torch.equal(epochs[0][0]["act"], epochs[1][0]["act"])
    resumed = for_saev(other.loader(WIDE, batch_size=SIZE, columns=columns, where=WHERE))
    next(iter(feed))
    resumed.load_state_dict(feed.state_dict())
    assert torch.equal(next(iter(resumed))["act"], [*islice(for_epoch(feed, 2), 2)][1]["act"])
    acts = (batch["act"] for batch in for_saev(training(archive, columns=columns, epochs=None)))
    losses = learned(Crosscoder(1, 16), acts, 60)
    assert losses[-1] < losses[0] / 2
    with pytest.raises(AnalysisError, match=r"columns=\['position', 'example'\]"):
        for_saev(training(archive, columns=["position"]))
    with pytest.raises(AnalysisError, match="one site"):
        for_saev(training(archive, [WIDE, NARROW], columns=columns))


def for_epoch(feed: Any, epoch: int) -> Any:
    feed.loader.set_epoch(0)
    feed.loader.set_epoch(epoch)
    return feed


def test_a_missing_package_and_unfit_loaders_are_named(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, endless = ["token"], {"epochs": None}
    monkeypatch.setattr(feed_module, "find_spec", lambda name: None)
    for name in ("sae_lens", "dictionary_learning", "llamascopium", "lm_saes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for adapter, install in (
        (for_sae_lens, "pip install sae-lens"),
        (for_multi_sae_lens, "pip install sae-lens"),
        (for_train_sae, "pip install dictionary-learning"),
        (for_openmoss, "pip install llamascopium"),
    ):
        with pytest.raises(MissingPackageError, match=install):
            adapter(training(archive, columns=columns, **endless))
    for name in ("sae_lens", "dictionary_learning"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for endless_only in (for_sae_lens, for_multi_sae_lens, for_train_sae):
        with pytest.raises(AnalysisError, match=r"ends after 22.*epochs=None"):
            endless_only(training(archive))
    with pytest.raises(AnalysisError, match=r"feed\.scale"):
        for_sae_lens(training(archive, normalise="mean_norm", **endless))
    with pytest.raises(AnalysisError, match="for_multi_sae_lens"):
        for_sae_lens(training(archive, [WIDE, NARROW], **endless))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the archives of docs/trainers.md."""
    folder = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("acts.zarr", "acts-chat.zarr")):
        make_trained(folder / name, seed=seed, widths={"resid_post.2": 16})
    return folder


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("section", ["Two models", "OpenMOSS", "saev"])
def test_the_page_feeds_trainers(page: Path, section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page)
    names: dict[str, Any] = {"residua": residua, "archive": residua.open("acts.zarr")}
    run(blocks("docs/trainers.md", section), names)
    assert {"Two models": "rows", "OpenMOSS": "norms", "saev": "feed"}[section] in names


def test_the_page_trains_a_dictionary(page: Path, train_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page)
    package, top_k = train_sae
    config = {"trainer": top_k.TopKTrainer, "steps": 30, "activation_dim": 16, "dict_size": 64, "k": 3, "layer": 2}
    config |= {"lm_name": "none", "warmup_steps": 5, "seed": 0, "device": "cpu"}
    names = {"residua": residua, "archive": residua.open("acts.zarr"), "config": config, "trainSAE": package.trainSAE}
    run(blocks("docs/trainers.md", "dictionary_learning"), names)
    assert Path("dictionaries/trainer_0/ae.pt").is_file()


def test_the_page_about_loaders_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page)
    names: dict[str, Any] = {"residua": residua, "archive": residua.open("acts.zarr"), "torch": torch}
    run(blocks("docs/loader.md"), names)
    assert names["alone"].state_dict()["divided"] == [[1, [1, 1, 1, 1]]]
    rows = names["archive"]["resid_post.2"][:].astype(np.float64)
    short = (np.linalg.norm(rows, axis=1) < 1000) & (names["archive"].rows.position[:] > 0)
    assert names["without_sinks"].n_rows == short.sum() > 0
