"""Tuned lenses (Belrose et al. 2023, arXiv 2303.08112): an affine map at every point of the residual stream.

The model's own LM head decodes the mapped residual stream. A lens is trained from an archive, without the model; see
`residua.analysis.lens.train`. On disk it is a folder that the `tuned-lens` package can load, with the LM head in it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, Unpack

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import Tensor

from residua.analysis.lens.checkpoint import (
    LensConfig,
    Translator,
    hash_unembedding,
    read_checkpoint,
    write_checkpoint,
)
from residua.analysis.lens.evaluate import REPORT
from residua.analysis.lens.lens_settings import LensOptions, LensSettings
from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.rows import layer_of
from residua.analysis.lens.train import LensTraining
from residua.analysis.lens.unembedding import Decoder
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.plots import plot_lens
from residua.store.base.errors import AnalysisError
from residua.store.edits import lens_files
from residua.store.edits.lens_files import CONFIG_FILE, LAYERS_FILE
from residua.store.format.sidecars import LM_HEAD_FILE, PARAMETERS_FILE
from residua.store.read.archive import Archive
from residua.store.read.stacks import main_archive, open_archive
from residua.store.storage.address import is_remote
from residua.store.storage.files import write_file
from residua.store.storage.mirror import fetched
from residua.store.storage.place import result_folder, saved_to

REPORT_FILE, PLOT_FILE = "report.parquet", "report.png"
_HEAD_FILES = tuple(f"head/{name}" for name in (LM_HEAD_FILE, PARAMETERS_FILE))
_FILES = (CONFIG_FILE, lens_files.PARAMETERS_FILE, LAYERS_FILE, REPORT_FILE, *_HEAD_FILES)
_UNEMBEDDING_BYTES = 2**29  # a larger unembedding is not converted to float32 at once


class TunedLens:
    """A tuned lens, with the LM head that decodes it.

    Args:
        head: Final norm and unembedding.
        translators: Affine maps by layer, the number of blocks before a point of the residual stream.
        config: The model's name and sizes.
        report: The evaluation on held-out rows; see `fit`.

    Example:
        >>> lens = TunedLens.fit(archive, sites="resid_post.*")  # doctest: +SKIP
        >>> lens.decode("resid_post.3", archive["resid_post.3"].torch([17])).argmax(-1)  # doctest: +SKIP
    """

    def __init__(
        self, head: LMHead, translators: Mapping[int, Translator], config: LensConfig, report: pa.Table | None = None
    ) -> None:
        self.head = head
        self.translators = dict(translators)
        self.config = config
        self.report = report
        self._decoder = Decoder(head, most_bytes=_UNEMBEDDING_BYTES)

    @classmethod
    def fit(
        cls,
        archive: Archive | str | PathLike[str],
        *,
        sites: str | Iterable[str] | None = None,
        out: str | PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cluster: Cluster | None = None,
        settings: LensSettings | None = None,
        **options: Unpack[LensOptions],
    ) -> Self:
        """Train a lens on an archive.

        Args:
            archive: The archive, with its LM head, the final residual stream (`final`, or the last `resid_post`, which
                has the same values) and some `resid_pre` or `resid_post` before it.
            sites: Patterns of the sites to train at; by default all of them.
            out: Folder for the lens, its report (Parquet) and plot, or its address in a bucket. A stopped training
                continues from its finished layers in a folder. By default nothing is kept.
            storage_options: For `out` in a bucket, as for `residua.open`.
            cluster: Where to work, from `residua.analysis.connect`; by default in this process. Its
                workers need the archive and `out` under the same paths.
            settings: The settings.
            **options: Single settings by name, as in `residua.analysis.lens.lens_settings.LensSettings`, for example
                ``rows=100_000``.

        Returns:
            The lens. Its `report` has a line per site, measured on held-out examples: the KL divergence from the
            model's own distribution and the cross-entropy to the next token, in nats, and how often the most probable
            tokens agree, each next to the logit lens. The lens's KL is never above the logit lens's.

        Raises:
            AnalysisError: The archive lacks what is needed, or `out` holds a lens of other settings.
            UnknownSiteError: `sites` matches no stored site.
            OSError: The place `out` cannot be written; this is tried before anything is computed.
        """
        settings = replace(settings or LensSettings(), **options)
        source = main_archive(open_archive(archive))
        with ExitStack() as stack:
            if out is None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="residua-lens-")))
            else:
                folder = stack.enter_context(result_folder(out, storage_options))
            training = LensTraining(source, folder, sites=sites, settings=settings, cluster=or_inline(cluster))
            training.train()
            lens = cls(*training.evaluate())
            lens.save(folder)
            training.clear()
        return lens

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        head: str | PathLike[str] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a lens that `save` or the `tuned-lens` package wrote.

        Args:
            folder: The lens, or its address.
            head: An archive of the same model, its address, or its folder ``head``; required if the lens has no LM head
                of its own.
            storage_options: For addresses, as for `residua.open`.

        Raises:
            AnalysisError: The folder holds no lens, or the LM head belongs to another model.
            DamagedArchiveError: The head is missing or cut short.
            UnsafeArchiveError: The LM head's files do not describe one.
        """
        if head is not None and is_remote(head):
            archive = open_archive(head, storage_options=storage_options)  # whose local files go with it
            head = archive.head
        with fetched(folder, storage_options, names=_FILES) as local:
            return cls._load(local, local / "head" if head is None else Path(head))

    @classmethod
    def _load(cls, folder: Path, source: Path) -> Self:
        config, translators = read_checkpoint(folder)
        found = load_lm_head(source / "head" if (source / "head").is_dir() else source)
        if config.unembed_hash not in (None, hash_unembedding(found.parameters["unembed.weight"])):
            raise AnalysisError(
                f"{folder} is a lens of {config.base_model_name_or_path} with another unembedding than {source} has: "
                "give the LM head of the model that the lens was trained for"
            )
        if config.d_model != found.width:
            raise AnalysisError(f"{folder} is a lens of width {config.d_model}, but {source} has {found.width}")
        return cls(found, translators, config, _read_report(folder / REPORT_FILE))

    def save(self, folder: str | PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Write the lens as a folder that the `tuned-lens` package can load, with its LM head and report.

        Points without a translator become the logit lens there. The report is written as a table and a plot.

        Args:
            folder: The folder, or its address in a bucket.
            storage_options: For an address, as for `residua.open`.

        Raises:
            PlanError: Nothing can be written at such an address.
            OSError: The files cannot be written.
        """
        with saved_to(folder, storage_options) as local:
            self._save(local)

    def _save(self, folder: Path) -> None:
        if self.report is not None:
            sink = pa.BufferOutputStream()
            pq.write_table(self.report, sink)
            write_file(folder / REPORT_FILE, [sink.getvalue()])
            plot_lens(folder / PLOT_FILE, self.report)
        write_file(folder / "head" / PARAMETERS_FILE, [save(dict(self.head.parameters))])
        write_file(folder / "head" / LM_HEAD_FILE, [self.head.spec.to_json()])
        write_file(folder / LAYERS_FILE, [json.dumps({"depths": sorted(self.translators)}).encode()])
        write_checkpoint(folder, self.config, self.translators)

    def apply(self, site: str, hidden: Tensor) -> Tensor:
        """Estimate the final residual stream.

        Args:
            site: A `resid_pre` or `resid_post`.
            hidden: Its values, (..., width), of any floating type.

        Returns:
            (..., width), float32, except for what the final norm removes (the length, and for layer norm the mean).

        Raises:
            AnalysisError: The lens was not trained at this point.
        """
        layer = layer_of(site)
        if layer == self.config.num_hidden_layers:
            return hidden.float()
        if layer not in self.translators:
            raise AnalysisError(
                f"the lens was requested at {site}, which is layer {layer} of a lens, but it was trained at "
                f"{', '.join(map(str, sorted(self.translators)))}: choose another site, or train it there"
            )
        return self.translators[layer](hidden.float().reshape(-1, self.config.d_model)).reshape(hidden.shape)

    def decode(self, site: str, hidden: Tensor) -> Tensor:
        """Return the logits of the lens at a site, (..., vocabulary), float32; arguments as for `apply`."""
        final = self.apply(site, hidden)
        logits = self._decoder.logits(final.reshape(-1, self.config.d_model))
        return logits.reshape(*hidden.shape[:-1], -1)


def _read_report(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    try:
        report = pq.read_table(path)
        if not report.num_rows:
            raise ValueError("it has no lines")
        return report.select(REPORT.names).cast(REPORT)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise AnalysisError(f"{path} is not the report of a lens ({error}): remove it, or train again") from error
