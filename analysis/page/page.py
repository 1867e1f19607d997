"""A static page of an archive, to look at without a server: what it holds, its sites, examples, directions and heads.

The page is a folder of HTML, style, scripts and data. Data are script files, since a page from a disk may load nothing
else; one is loaded when it is looked at. `residua.analysis.page.scripts` says why nothing in an archive can become a
script.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from residua.analysis.page.directions import Direction, Wanted, directions_of
from residua.analysis.page.examples import Shown, choose, read_shown, texts_of, to_json
from residua.analysis.page.heads import plan_patterns, read_patterns, read_scores
from residua.analysis.page.measures import Measured, SiteMeasures, measure, measure_shown
from residua.analysis.page.ranges import ranges_of
from residua.analysis.page.readouts import lens_sites, read_out
from residua.analysis.page.scripts import DATA, packed, write_script
from residua.analysis.stats.site_stats import Stats
from residua.analysis.stats.stats import stats
from residua.analysis.stats.top import Best, described
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import Location
from residua.store.base.errors import AnalysisError, few
from residua.store.base.naming import named
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive
from residua.store.read.stacks import by_rows, open_archive
from residua.store.read.summary import summarise
from residua.store.storage.address import is_remote, joined
from residua.store.storage.files import write_file
from residua.store.storage.place import result_folder

INDEX = "index.html"
_SCRIPTS = ("page", "charts", "strips", "ranges", "browser", "views", "heads")
_ASSETS = (INDEX, "page.css", *(f"{name}.js" for name in _SCRIPTS))
_ARCHIVE, _EXAMPLES = "archive", "examples"
_READOUT_TOKENS = 5
_MOST_POSITIONS = 512  # of the norms by position
_WEIGHTS = ("pattern", "cross_pattern")  # kinds whose rows are no vectors of a space
_NO_LENS = "lens read-outs are not shown: they need resid_pre or resid_post sites, and an archive with its LM head"


class Page(NamedTuple):
    """A page that was written.

    Attributes:
        file: The file to open in a browser, or its address.
        n_examples: Examples that it shows.
        n_bytes: Bytes of the folder.
        notes: What it lacks and why, one sentence each.
    """

    file: Path | str
    n_examples: int
    n_bytes: int
    notes: tuple[str, ...]


def page(
    archive: Archive | str | PathLike[str],
    out: str | PathLike[str],
    *,
    sites: str | Iterable[str] = "*",
    directions: Iterable[Wanted] = (),
    lens: str | PathLike[str] | None = None,
    heads: pa.Table | str | PathLike[str] | None = None,
    examples: int = 1000,
    tokens: int = 256,
    k: int = 20,
    lens_examples: int = 100,
    cluster: Cluster | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Page:
    """Write a folder with a page that shows an archive; open its ``index.html``.

    Rows are read twice, for their mean and for what is measured of them, in memory that does not grow with them. A
    page that is there already is replaced.

    Args:
        archive: The archive, or its path or address.
        out: The folder of the page, or its address in a bucket.
        sites: The sites to show, for example ``resid_post.*``; of an archive of several stacks those of one. Keys and
            values of cross-attention have rows of the encoder, and are left out of a page of the decoder.
        directions: Directions to colour tokens by and to find the strongest rows of: texts such as
            ``resid_post.3=channel:17`` (see `residua.analysis.page.directions`), or tuples of a name, a site and a
            vector. Files and folders in them may be at addresses.
        lens: Folder of a tuned lens to read out of the residual stream, or its address; by default the logit lens, if
            the archive has an LM head.
        heads: Scores of heads: the table of `residua.induction_scores` or `residua.heads`, its Parquet file, or the
            folder that one of the two commands wrote; or the address of these.
        examples: Number of examples, spread evenly over the archive. Those of the strongest rows come besides.
        tokens: Tokens to show of an example, from its first one on.
        k: Rows to show at either end of each measure, at most one of an example.
        lens_examples: Examples with read-outs of the lens.
        cluster: Where to compute; by default in this process.
        storage_options: For addresses, as for `residua.open`.

    Raises:
        UnknownSiteError: `sites` names no stored site, or sites of several stacks.
        AnalysisError: A direction, the lens or the scores cannot be read or do not fit, a number is too small, or the
            archive has no captured rows.
        OSError: `out` cannot be written, or has files of something else.

    Example:
        >>> residua.page("acts.zarr", "page", directions=["resid_post.3=channel:17"]).file  # doctest: +SKIP
    """
    for name, number, least in (
        ("examples", examples, 1),
        ("tokens", tokens, 1),
        ("k", k, 1),
        ("lens_examples", lens_examples, 0),
    ):
        if number < least:
            raise AnalysisError(f"{name} is {number}: ask for at least {least}")
    opened, cluster = open_archive(archive, storage_options=storage_options), or_inline(cluster)
    archive, chosen, others = _of_one_stack(opened, sites)
    place = None if lens is None else fspath(lens) if is_remote(lens) else str(Path(lens).absolute())
    decoder = None if place is None else Location(place, {"storage_options": storage_options})
    names = _vector_sites(archive, chosen)
    wanted = directions_of(archive, directions, place, storage_options)
    names += [name for name in archive.sites if name not in names and any(one.site == name for one in wanted)]
    decoded = lens_sites(archive, names, decoder) if lens_examples else []
    scores = None if heads is None else read_scores(heads, storage_options)
    with result_folder(out, storage_options) as folder:
        _clear(folder)
        found = stats(archive, names, components=0, cluster=cluster)
        measures = [_measures_of(found, name, wanted) for name in names]
        measured = measure(archive, measures, k=k, cluster=cluster)
        shown = _shown(archive, measured.values(), examples, tokens)
        writer = _Writer(folder, archive, shown)
        sites_json = writer.sites(found, measures, measured)
        for site, values in measure_shown(archive, measures, shown.rows, cluster=cluster):
            writer.values(site, values)
        rows = shown.rows[:lens_examples]
        for site, readouts in read_out(archive, decoded, rows, lens=decoder, k=_READOUT_TOKENS, cluster=cluster):
            writer.readouts(site, readouts.tokens, readouts.probabilities)
        patterns = plan_patterns(archive, shown)
        for layer in read_patterns(patterns, shown, cluster=cluster):
            writer.pattern(layer.layer, layer.weights)
        notes = tuple(filter(None, [others, patterns.note, "" if decoded or not lens_examples else _NO_LENS]))
        writer.finish(
            {
                "sites": sites_json,
                "readouts": {"lens": "logit lens" if lens is None else "tuned lens", "n_examples": len(rows)},
                "patterns": {"examples": patterns.examples, "n_tokens": patterns.n_tokens},
                "scores": scores,
                "page_notes": notes,
            }
        )
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Page(joined(fspath(out), INDEX) if is_remote(out) else Path(out) / INDEX, len(shown.numbers), n_bytes, notes)


def _of_one_stack(archive: Archive, sites: str | Iterable[str]) -> tuple[Archive, tuple[str, ...], str]:
    """Return the archive of the stack that `sites` name, its sites, and a note on those that have rows of another."""
    found = by_rows(archive, sites)
    stacks = {parse_site(name).stack for _, names in found for name in names}
    if len(found) == 1 or len(stacks) > 1:
        own = archive.of_sites(sites)
        return own, own.select(sites), ""
    ((rows, own_names),) = (one for one in found if {parse_site(name).row_stack for name in one[1]} == stacks)
    others = [name for _, names in found for name in names if name not in own_names]
    note = (
        f"{few(others)} have rows of another stack, {parse_site(others[0]).row_stack}, and are left out: a page of "
        f"their own shows them ({named('sites', others[0].rpartition('.')[0] + '.*')})"
    )
    return rows, own_names, note


def _vector_sites(archive: Archive, names: Sequence[str]) -> list[str]:
    """Return those of `names` whose rows are vectors: neither attention weights nor numbers of tokens and experts."""
    found = [name for name in names if archive[name].dtype.kind == "f" and parse_site(name).kind not in _WEIGHTS]
    if not found:
        raise AnalysisError(
            f"a page of {', '.join(names)} alone has no rows to measure, because they hold attention weights or whole "
            "numbers: choose other sites"
        )
    return found


def _clear(folder: Path) -> None:
    """Remove the data of an earlier page; raise FileExistsError if the folder has files of something else."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_page = (folder / DATA / f"{_ARCHIVE}.js").is_file()
    was_begun = DATA in there and there <= {DATA, *_ASSETS}  # and stopped before that file was written
    if there and not is_page and not was_begun:
        raise FileExistsError(
            f"{folder} has files of something else, {min(there)} for example: choose another folder, or remove them"
        )
    for path in (folder / DATA).glob("*.js"):
        path.unlink()


def _measures_of(found: Stats, site: str, wanted: Sequence[Direction]) -> SiteMeasures:
    mean = found.channels.filter(pc.field("site") == site)["mean"].to_numpy()
    return SiteMeasures(site, mean, tuple(one for one in wanted if one.site == site))


def _shown(archive: Archive, measured: Iterable[Sequence[Measured]], examples: int, tokens: int) -> Shown:
    ends = [best for site in measured for one in site for best in (one.strongest, one.weakest)]
    besides = {example for best in ends for example in best.examples.tolist()}
    return read_shown(archive, choose(archive, examples, besides), tokens)


class _Writer:
    """Writes the files of a page, and lists them in the file of the archive."""

    def __init__(self, folder: Path, archive: Archive, shown: Shown) -> None:
        self._folder = folder
        self._archive = archive
        self._shown = shown
        self._number = {name: i for i, name in enumerate(archive.sites)}
        self._files: dict[str, dict[str, str]] = {"values": {}, "readouts": {}, "patterns": {}}
        self._read_tokens: set[int] = set()

    def sites(
        self, found: Stats, measures: Sequence[SiteMeasures], measured: dict[str, list[Measured]]
    ) -> list[dict[str, Any]]:
        """Return what the page says of each site: statistics, and each of its measures."""
        lines = {line["site"]: line for line in found.sites.to_pylist()}
        return [
            {
                **lines[one.site],
                "positions": _norms_by_position(found, one.site),
                "ranges": ranges_of(self._archive, one.site, self._shown.rows),
                "measures": [
                    self._measure(name, each) for name, each in zip(one.names, measured[one.site], strict=True)
                ],
            }
            for one in measures
        ]

    def _measure(self, name: str, measured: Measured) -> dict[str, Any]:
        return {
            "name": name,
            "histogram": measured.histogram.to_json(),
            "strongest": self._rows(measured.strongest, 1),
            "weakest": self._rows(measured.weakest, -1),
        }

    def _rows(self, best: Best, sign: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = described(self._archive, best, sign=sign).to_pylist()
        return found

    def values(self, site: str, values: np.ndarray[Any, Any]) -> None:
        """Write the measures of the shown rows of a site."""
        self._write("values", site, [packed(one) for one in values])

    def readouts(self, site: str, tokens: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> None:
        """Write what a lens reads out of a site."""
        self._read_tokens.update(np.unique(tokens).tolist())
        value = {"k": tokens.shape[1], "tokens": packed(tokens), "probabilities": packed(probabilities)}
        self._write("readouts", site, value)

    def pattern(self, layer: int, weights: Sequence[np.ndarray[Any, Any]]) -> None:
        """Write the patterns of a layer."""
        name = f"pattern-{layer}"
        value = {"n_heads": len(weights[0]) if weights else 0, "weights": [packed(one) for one in weights]}
        self._files["patterns"][str(layer)] = write_script(self._folder, name, value)

    def _write(self, kind: str, site: str, value: Any) -> None:
        self._files[kind][site] = write_script(self._folder, f"{kind}-{self._number[site]}", value)

    def finish(self, more: dict[str, Any]) -> None:
        """Write the examples, the archive's own file, and what is the same on every page."""
        archive, shown = self._archive, self._shown
        tokens = {token for ids in shown.tokens for token in np.unique(ids).tolist()} | self._read_tokens
        texts = texts_of(archive.tokenizer, tokens)
        write_script(self._folder, _EXAMPLES, to_json(archive, shown, texts))
        about = summarise(archive).to_json()
        place = archive.place if is_remote(archive.place) else Path(archive.place).resolve().name
        value = {
            **about,
            **more,
            "path": place,
            "stored": about["sites"],
            "files": {kind: dict(sorted(found.items())) for kind, found in self._files.items()},
            "residua": version("residua"),
        }
        write_script(self._folder, _ARCHIVE, value)
        for name in _ASSETS:
            content = files("residua.analysis.page").joinpath("assets", name).read_bytes()
            write_file(self._folder / name, [content])


def _norms_by_position(found: Stats, site: str) -> dict[str, list[float]]:
    table = found.positions.filter(pc.field("site") == site).slice(0, _MOST_POSITIONS)
    return {name: table[name].to_pylist() for name in ("position", "norm_mean", "norm_std")}
