"""Batches for SAELens 6: `SAETrainer` and `MultiSAETrainer`, their scaling, their evaluation, their checkpoints.

SAELens scales rows itself, and folds the scale into the weights when it is done. It would estimate the scale from
batches that are then not trained on; `SAELensFeed.scale` gives it the constants of the archive instead.
"""

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from residua.analysis.loader.feed import Feed, named, only_site, renamed, require_endless, require_package
from residua.analysis.loader.loader import Loader
from residua.analysis.loader.normalisation import Kind
from residua.store.base.errors import AnalysisError

T = TypeVar("T", Tensor, dict[str, Tensor])

STATE = "residua_loader.json"
"""File of a checkpoint that holds the loader's position."""

_TRAINER = "SAELens"
_KINDS: Mapping[str, Kind] = {"expected_average_only_in": "mean_norm", "covariance_whitening": "whiten"}


def for_sae_lens(loader: Loader) -> "SAELensFeed":
    """Return the ``data_provider`` of SAELens's `SAETrainer`: tensors without end, ``(batch, *row shape)``.

    >>> feed = residua.analysis.for_sae_lens(archive.loader(site, batch_size=4096, epochs=None))  # doctest: +SKIP
    >>> trainer = SAETrainer(cfg, sae, data_provider=feed, save_checkpoint_fn=feed.save)  # doctest: +SKIP

    Args:
        loader: A loader of one site, with ``epochs=None`` and without ``normalise``.

    Raises:
        MissingPackageError: SAELens is not installed.
        AnalysisError: The loader has several sites, an end, or scales rows itself.
    """
    site = only_site(_checked(loader), f"{_TRAINER}'s SAETrainer (for several sites there is for_multi_sae_lens)")
    return SAELensFeed(loader, lambda batch: batch[site], {site: site})


def for_multi_sae_lens(loader: Loader, hooks: Mapping[str, str] | None = None) -> "MultiSAELensFeed":
    """Return the ``data_provider`` of SAELens's `MultiSAETrainer`: without end, ``{hook: (batch, *row shape)}``.

    The rows of a batch are the same tokens at all hooks.

    Args:
        loader: A loader of the sites, with ``epochs=None`` and without ``normalise``.
        hooks: The trainer's hook names by site; by default they are the sites' names.

    Raises:
        MissingPackageError: SAELens is not installed.
        AnalysisError: The loader has an end, or scales rows itself, or `hooks` does not fit its sites.
    """
    names = named(_checked(loader), hooks, _TRAINER)
    return MultiSAELensFeed(loader, lambda batch: renamed(batch, names), names)


class _SAELensFeed(Feed[T]):
    """Batches for SAELens, without end, in the form of one of its trainers.

    Attributes:
        loader: The loader.
        names: The trainer's hook name of each site.
    """

    def __init__(self, loader: Loader, form: Any, names: Mapping[str, str]) -> None:
        super().__init__(loader, form)
        self.names = names

    def scale(self, trainer: Any) -> None:
        """Give a trainer what its autoencoders' ``normalize_activations`` asks for, from stored rows.

        ``expected_average_only_in`` is the loader's ``mean_norm``, ``covariance_whitening`` its ``whiten``. What a
        trainer has from a checkpoint stays. No batch is used up, and SAELens folds the constants into the weights.

        Args:
            trainer: A `SAETrainer` or a `MultiSAETrainer`.
        """
        constants: dict[Kind, Any] = {}
        for site, one in self._trainers(trainer):
            scaler, kind = one.activation_scaler, _KINDS.get(one.sae.cfg.normalize_activations)
            if kind is None or scaler.scaling_factor is not None or scaler.whitening is not None:
                continue
            if kind not in constants:
                constants[kind] = self.loader.constants(kind)
            found = constants[kind][site]
            if kind == "mean_norm":
                scaler.scaling_factor = found.factor.item()
            else:
                of_trainer = import_module(type(scaler).__module__)  # the SAELens that the trainer is from
                scaler.whitening = of_trainer.ActivationWhitening(found.mean, found.factor, found.inverse)

    def save(self, checkpoint_path: Path | None) -> None:
        """Write the position into a checkpoint's folder; for the ``save_checkpoint_fn`` of a trainer.

        Args:
            checkpoint_path: The folder; None, as SAELens says it where it keeps none, writes nothing.
        """
        if checkpoint_path is not None:
            (checkpoint_path / STATE).write_text(json.dumps(self.state_dict()))

    def load(self, checkpoint_path: Path | str) -> None:
        """Continue from a checkpoint's folder.

        Raises:
            FileNotFoundError: It holds no position: the trainer had no ``save_checkpoint_fn=feed.save``.
            AnalysisError: The loader has other settings, or is of another archive.
        """
        self.load_state_dict(json.loads((Path(checkpoint_path) / STATE).read_text()))

    def _checked_held_out(self, held_out: Loader) -> Loader:
        """Return a loader if it can evaluate what this one trains; else raise AnalysisError."""
        if held_out.sites != self.loader.sites or held_out.is_endless:
            raise AnalysisError(
                f"{held_out} cannot evaluate what {self.loader} trains: give a loader of the same sites, without "
                "epochs=None"
            )
        if held_out.shares_rows(self.loader):
            raise AnalysisError(
                f"{held_out} has rows that are trained on: give the training split='train' and the evaluation "
                "split='test', or conditions (where=) that no row meets both"
            )
        return held_out

    def _trainers(self, trainer: Any) -> Iterator[tuple[str, Any]]:
        """Yield the site and the trainer of each autoencoder."""
        of_names = {name: site for site, name in self.names.items()}
        if hasattr(trainer, "hook_names"):
            yield from ((of_names[trainer.hook_names[name]], one) for name, one in trainer.trainers.items())
        else:
            yield self.loader.sites[0], trainer


class SAELensFeed(_SAELensFeed[Tensor]):
    """Tensors for SAELens's `SAETrainer`, without end; made by `for_sae_lens`.

    Attributes:
        loader: The loader.
        names: The site's name, under itself.
    """

    def evaluator(self, held_out: Loader, *, n_batches: int | None = None) -> "SAELensEvaluator":
        """Return the ``evaluator`` of a trainer: it measures on rows that are not trained on, the same ones each time.

        Args:
            held_out: A loader of the same site, for example with ``split="test"`` where this one has
                ``split="train"``; it has an end.
            n_batches: Batches of an evaluation; by default all.

        Raises:
            AnalysisError: A row of `held_out` is also trained on, or it has no end or another site.
        """
        return SAELensEvaluator(self._checked_held_out(held_out), n_batches)


class MultiSAELensFeed(_SAELensFeed[dict[str, Tensor]]):
    """Dictionaries by hook for SAELens's `MultiSAETrainer`, without end; made by `for_multi_sae_lens`.

    Attributes:
        loader: The loader.
        names: The trainer's hook name of each site.
    """

    def evaluator(self, held_out: Loader, *, n_batches: int | None = None) -> "MultiSAELensEvaluator":
        """Return the ``evaluator`` of a trainer; as that of `SAELensFeed`, for several autoencoders.

        Raises:
            AnalysisError: A row of `held_out` is also trained on, or it has no end or other sites.
        """
        return MultiSAELensEvaluator(self._checked_held_out(held_out), self.names, n_batches)


class SAELensEvaluator:
    """Measures an autoencoder on held-out rows; made by `SAELensFeed.evaluator`, and called by `SAETrainer`.

    It returns ``held_out/explained_variance`` (1 - squared error / variance around the mean), ``held_out/mse`` (mean
    squared error of a row, of scaled values) and ``held_out/l0`` (mean number of active latents).
    """

    def __init__(self, loader: Loader, n_batches: int | None) -> None:
        self._loader, self._n_batches = loader, n_batches

    def __call__(
        self,
        sae: Any,
        data_provider: object,  # noqa: ARG002  # SAELens gives it
        activation_scaler: Any,
    ) -> dict[str, float]:
        """Return the measures; `data_provider`, which is the training's, is not used."""
        return _measured(self._loader, self._n_batches, {"": _Sums(self._loader.sites[0], sae, activation_scaler)})


class MultiSAELensEvaluator:
    """As `SAELensEvaluator`, for `MultiSAETrainer`; each measure begins with the autoencoder's name and a slash."""

    def __init__(self, loader: Loader, names: Mapping[str, str], n_batches: int | None) -> None:
        self._loader, self._n_batches = loader, n_batches
        self._sites = {name: site for site, name in names.items()}

    def __call__(
        self,
        saes: Mapping[str, Any],
        data_provider: object,  # noqa: ARG002  # SAELens gives it
        activation_scalers: Mapping[str, Any],
        hook_names: Mapping[str, str],
    ) -> dict[str, float]:
        """Return the measures; `data_provider`, which is the training's, is not used."""
        sums = {
            f"{name}/": _Sums(self._sites[hook_names[name]], sae, activation_scalers[name])
            for name, sae in saes.items()
        }
        return _measured(self._loader, self._n_batches, sums)


def _measured(loader: Loader, n_batches: int | None, sums: Mapping[str, "_Sums"]) -> dict[str, float]:
    with torch.no_grad():
        for batch in islice(loader, n_batches):
            for each in sums.values():
                each.add(batch[each.site])
    return {f"{name}held_out/{key}": value for name, each in sums.items() for key, value in each.measures().items()}


class _Sums:
    """What one autoencoder leaves over, added up over batches."""

    def __init__(self, site: str, sae: Any, scaler: Any) -> None:
        self.site = site
        self._sae, self._scaler = sae, scaler
        self._n_rows, self._error, self._active = 0, 0.0, 0.0
        self._sum: Tensor | float = 0.0
        self._squares = 0.0

    def add(self, rows: Tensor) -> None:
        parameter: Tensor = next(self._sae.parameters())
        scaled: Tensor = self._scaler.scale(rows.to(parameter.device, parameter.dtype))
        latents: Tensor = self._sae.encode(scaled)
        exact = scaled.double()
        self._n_rows += len(exact)
        self._error += (exact - self._sae.decode(latents)).pow(2).sum().item()
        self._active += (latents.to_dense() if latents.is_sparse else latents).ne(0).sum().item()
        self._sum = self._sum + exact.sum(dim=0)
        self._squares += exact.pow(2).sum().item()

    def measures(self) -> dict[Literal["explained_variance", "mse", "l0"], float]:
        mean = torch.as_tensor(self._sum) / self._n_rows
        variance = self._squares - self._n_rows * mean.pow(2).sum().item()
        return {
            "explained_variance": 1 - self._error / variance,
            "mse": self._error / self._n_rows,
            "l0": self._active / self._n_rows,
        }


def _checked(loader: Loader) -> Loader:
    require_package(["sae_lens"], _TRAINER, "pip install sae-lens")
    require_endless(loader, _TRAINER)
    if loader.normalisation:
        raise AnalysisError(
            f"{_TRAINER} scales rows itself and folds the scale into the weights, so {loader} must not: create it "
            "without normalise=, set normalize_activations in the autoencoder's configuration, and call "
            "feed.scale(trainer)"
        )
    return loader
