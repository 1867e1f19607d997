"""SAELens trains on an archive: `SAETrainer` and `MultiSAETrainer`, with scale, evaluation and exact resume."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residua
from residua.analysis.loader.sae_lens import SAELensFeed, for_multi_sae_lens, for_sae_lens
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.trained_archive import NARROW, WIDE, make_trained
from tests.pages import blocks, run

with warnings.catch_warnings():  # those of SAELens and TransformerLens, on import
    warnings.simplefilter("ignore")
    sae_lens: Any = pytest.importorskip("sae_lens")
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # type: ignore[import-untyped]  # it has no marker
    from sae_lens.training import sae_trainer  # type: ignore[import-untyped]  # it has no marker
    from sae_lens.training.multi_sae_trainer import (  # type: ignore[import-untyped]  # it has no marker
        MultiSAETrainer,
    )

SIZE, STEPS = 64, 60
WHERE = "position > 0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_trained(tmp_path_factory.mktemp("sae") / "a.zarr")


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keep what trainers log, instead of sending it."""
    entries: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.log", lambda entry, step: entries.append(entry))
    return entries


def autoencoder(width: int, scaling: str = "expected_average_only_in", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = {"k": 3, "d_in": width, "d_sae": 4 * width, "normalize_activations": scaling, "device": "cpu"}
    return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**config))


def configuration(steps: int = STEPS, **settings: Any) -> Any:
    logger = LoggingConfig(wandb_log_frequency=10, eval_every_n_wandb_logs=2)
    given = {"total_training_samples": steps * SIZE, "train_batch_size_samples": SIZE, "lr": 1e-2, "lr_end": 1e-3}
    return SAETrainerConfig(logger=logger, **given, **settings)


def feed_of(archive: Archive) -> SAELensFeed:
    loader = archive.loader(
        WIDE, batch_size=SIZE, seed=1, epochs=None, drop_last=True, where=WHERE, split="train", test_fraction=0.2
    )
    return for_sae_lens(loader)


def explained(sae: Any, rows: np.ndarray[Any, Any]) -> float:
    """Return the share of the variance of raw rows that an autoencoder explains, in float64."""
    values = rows.astype(np.float64)
    with torch.no_grad():
        found = sae.decode(sae.encode(torch.from_numpy(rows))).double().numpy()
    return float(1 - ((values - found) ** 2).sum() / ((values - values.mean(axis=0)) ** 2).sum())


def rows_at(archive: Archive, loader: Any) -> np.ndarray[Any, Any]:
    return archive[loader.sites[0]][np.sort(torch.cat([batch["row"] for batch in loader]).numpy())]


@pytest.mark.parametrize("scaling", ["expected_average_only_in", "covariance_whitening", "none"])
def test_a_trainer_learns_and_is_evaluated_on_rows_it_never_saw(
    archive: Archive, scaling: str, logged: list[dict[str, Any]]
) -> None:
    feed = feed_of(archive)
    held_out = archive.loader(WIDE, batch_size=100, where=WHERE, split="test", test_fraction=0.2)
    trainer = sae_trainer.SAETrainer(
        configuration(), autoencoder(16, scaling), feed, evaluator=feed.evaluator(held_out)
    )
    feed.scale(trainer)
    scaler = trainer.activation_scaler
    rows = np.arange(len(archive[WIDE]))
    train = np.setdiff1d(rows[rows % 10 > 0], torch.cat([batch["row"] for batch in held_out]).numpy())
    raw = archive[WIDE][train].astype(np.float64)
    if scaling == "expected_average_only_in":
        assert scaler.scaling_factor == pytest.approx(4 / np.linalg.norm(raw, axis=1).mean(), rel=1e-9)
    if scaling == "covariance_whitening":
        whitened = scaler.scale(torch.from_numpy(raw)).numpy()
        np.testing.assert_allclose(np.cov(whitened.T), np.eye(16), atol=0.02)
    sae = trainer.fit()
    counted = feed.state_dict()
    assert counted["passed"] * feed.loader.batches_per_epoch + counted["taken"] == STEPS  # no batch was used to scale
    assert trainer.n_training_samples == STEPS * SIZE
    scores = [entry["held_out/explained_variance"] for entry in logged if "held_out/explained_variance" in entry]
    assert len(scores) == 3
    assert scores[-1] > 0.7
    assert scores[-1] > scores[0]
    assert all(entry["held_out/l0"] <= 3 for entry in logged if "held_out/l0" in entry)
    assert explained(sae, rows_at(archive, held_out)) > 0.7  # the constants are in the weights
    untrained = autoencoder(16, "none")
    assert explained(untrained, rows_at(archive, held_out)) < 0.5


def test_a_training_goes_on_exactly_after_a_stop(archive: Archive, tmp_path: Path) -> None:
    feed = feed_of(archive)
    settings = configuration(40, n_checkpoints=1, checkpoint_path=str(tmp_path))
    trainer = sae_trainer.SAETrainer(settings, autoencoder(16, seed=3), feed, save_checkpoint_fn=feed.save)
    settings.logger.log_to_wandb = False
    feed.scale(trainer)
    finished = trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    resumed_feed = feed_of(archive)
    resumed_feed.load(checkpoint)
    resumed = sae_trainer.SAETrainer(configuration(40), autoencoder(16, seed=4), resumed_feed)
    resumed.cfg.logger.log_to_wandb = False
    resumed.sae.load_weights_from_checkpoint(checkpoint)
    resumed.load_trainer_state(checkpoint)
    scale = resumed.activation_scaler.scaling_factor
    resumed_feed.scale(resumed)
    assert resumed.activation_scaler.scaling_factor == scale  # as the weights were trained
    again = resumed.fit()
    assert resumed_feed.state_dict() == feed.state_dict()
    for name, value in finished.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_several_autoencoders_learn_from_the_same_rows(archive: Archive, logged: list[dict[str, Any]]) -> None:
    settings: Any = {"where": WHERE, "test_fraction": 0.2, "batch_size": SIZE}
    loader = archive.loader([WIDE, NARROW], epochs=None, split="train", **settings)
    hooks = {WIDE: "blocks.0.hook_resid_post", NARROW: "blocks.0.hook_mlp_out"}
    feed = for_multi_sae_lens(loader, hooks)
    held_out = archive.loader([WIDE, NARROW], split="test", **settings)
    trainer = MultiSAETrainer(
        configuration(40),
        {"wide": autoencoder(16), "narrow": autoencoder(8), "plain": autoencoder(8, "none")},
        {"wide": hooks[WIDE], "narrow": hooks[NARROW], "plain": hooks[NARROW]},
        feed,
        evaluator=feed.evaluator(held_out, n_batches=2),
    )
    feed.scale(trainer)
    factors = {name: one.activation_scaler.scaling_factor for name, one in trainer.trainers.items()}
    assert factors["plain"] is None
    assert factors["wide"] != factors["narrow"]
    saes = trainer.fit()
    scores = [entry for entry in logged if "narrow/held_out/explained_variance" in entry]
    assert len(scores) == 2
    for name, site in (("wide", WIDE), ("narrow", NARROW), ("plain", NARROW)):
        assert scores[-1][f"{name}/held_out/explained_variance"] > scores[0][f"{name}/held_out/explained_variance"]
        chosen = archive.loader(site, split="test", **settings)
        assert explained(saes[name], rows_at(archive, chosen)) > 0.4


def test_rows_of_the_training_are_not_evaluated_on(archive: Archive) -> None:
    feed = feed_of(archive)
    shared = [
        archive.loader(WIDE, batch_size=9),
        archive.loader(WIDE, batch_size=9, split="train", test_fraction=0.2, where=WHERE),
        archive.loader(WIDE, batch_size=9, split="test", test_fraction=0.5),
    ]
    for loader in shared:
        with pytest.raises(AnalysisError, match="rows that are trained on"):
            feed.evaluator(loader)
    feed.evaluator(archive.loader(WIDE, batch_size=9, split="test", test_fraction=0.2))
    feed.evaluator(archive.loader(WIDE, batch_size=9, where="position == 0"))
    with pytest.raises(AnalysisError, match="same sites"):
        feed.evaluator(archive.loader(NARROW, batch_size=9, split="test", test_fraction=0.2))


def test_the_page_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"residua": residua, "Path": Path, "MultiSAETrainer": MultiSAETrainer}
    names |= {"SAETrainer": sae_trainer.SAETrainer, "SAETrainerConfig": SAETrainerConfig}
    names |= {name: getattr(sae_lens, name) for name in ("TopKTrainingSAE", "TopKTrainingSAEConfig")}
    names["archive"] = make_trained(tmp_path / "acts.zarr", widths={"resid_post.1": 16, "resid_post.2": 16})
    run(blocks("docs/trainers.md", "SAELens"), names)
    assert set(names["saes"]) == {"resid_post.1", "resid_post.2"}


def test_the_page_for_users_of_saelens_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive = make_trained(tmp_path / "acts.zarr", widths={"resid_post.3": 128})
    names: dict[str, Any] = {"residua": residua, "archive": archive, "site": "resid_post.3"}
    page = "docs/from-saelens.md"
    run(blocks(page, "Batches for training"), names)
    (trained,) = blocks(page, "Batches for training", language="py")
    run([trained.replace("1_000_000", "640")], names)
    assert names["sae"].W_enc.shape == (128, 1024)
    rows = torch.from_numpy(archive["resid_post.3"][1:9])
    assert (names["sae"].encode(rows) > 0).sum(1).max() <= 16
