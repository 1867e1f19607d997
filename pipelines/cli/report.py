"""What the command line prints: for people as aligned text, for machines as one JSON object."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.progress import human_bytes
from residua.store.read.summary import Summary, summarise

if TYPE_CHECKING:
    from residua.capture.sites.site import SiteInfo
    from residua.pipelines.capture.capture import CaptureResult
    from residua.pipelines.capture.reproduce import Reproduction
    from residua.store.read.verify import Verification

_MOST_SHOWN = 400  # characters of one value: the vectors of edits are as long as rows


def print_json(value: object) -> None:
    """Print `value` as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return `rows`, the first of them headings, as aligned columns; those in `numbers` stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def print_capture(result: "CaptureResult", *, as_json: bool) -> None:
    """Print what a capture did."""
    summary, stats = summarise(result.archive), result.stats
    if as_json:
        figures = {**asdict(stats), "resumed": result.resumed, "notes": list(result.notes)}
        workers = [asdict(worker) for worker in result.workers]
        print_json(
            {"archive": summary.to_json(), "run": figures, "workers": workers, "dataset": asdict(result.dataset)}
        )
        return
    for note in result.notes:
        print(f"note: {note}")
    if result.resumed and not stats.rows:
        print("nothing was missing: the archive is complete")
    print(f"captured  {len(summary.sites)} sites of {summary.rows:,} rows ({summary.n_examples:,} examples)")
    if stats.rows and stats.seconds:
        rate = human_bytes(stats.logical_bytes / stats.seconds)
        print(
            f"rate      {stats.n_tokens / stats.seconds:,.0f} tokens/s, {rate}/s "
            f"({stats.seconds:.1f} s, of which {stats.stall_seconds:.1f} s waiting for the writer)"
        )
    _print_workers(result)
    print(f"size      {human_bytes(summary.stored_bytes)}: {_per_row(summary)}, {_smaller(summary)}")
    print(f"place     {summary.path}")
    _print_nonfinite(summary)


def _print_workers(result: "CaptureResult") -> None:
    """Print what each of several workers brought to the host, and what it sent to others."""
    if len(result.workers) == 1:
        return
    whole = max(1, result.stats.offloaded_bytes)
    rows = [
        (
            f"{worker.worker} on {worker.host}",
            human_bytes(worker.stats.offloaded_bytes),
            f"{100 * worker.stats.offloaded_bytes / whole:.0f} %",
            human_bytes(worker.stats.sent_bytes),
            human_bytes(worker.stats.stored_bytes),
        )
        for worker in result.workers
    ]
    print(table([("worker", "offloaded", "of all", "sent to others", "written"), *rows], (1, 2, 3, 4)))


def _smaller(summary: Summary) -> str:
    return f"{summary.ratio:.2f} times smaller than in memory"


def _per_row(summary: Summary) -> str:
    return f"{summary.stored_bytes / max(1, summary.rows):,.0f} bytes a token"


def _print_nonfinite(summary: Summary) -> None:
    found = {site.name: site.n_nonfinite for site in summary.sites if site.n_nonfinite}
    if found:
        worst = ", ".join(f"{name} {count:,}" for name, count in found.items())
        print(f"warning: NaN or infinite values, kept as they are: {worst}")


def print_info(summary: Summary, *, as_json: bool) -> None:
    """Print what an archive holds."""
    if as_json:
        print_json(summary.to_json())
        return
    total = summary.rows if summary.total_rows is None else summary.total_rows
    state = "sealed" if summary.sealed else f"not sealed: {summary.rows:,} of {total:,} rows are captured"
    print(f"{summary.path}  ({state})")
    print(f"  {total:,} rows, {summary.n_examples:,} examples, {summary.n_tokens:,} tokens")
    print(f"  columns of the examples: {', '.join(map(_spelt, summary.columns)) or 'none'}")
    shards = f"{summary.shards}" if summary.sealed else f"{summary.shards} of {summary.total_shards or '?'}"
    word = "shard" if shards == "1" else "shards"
    print(f"  {shards} {word} of {summary.rows_per_shard:,} rows, plan {summary.digest[:12]}")
    print(f"  {'with' if summary.has_head else 'without'} the model's head (final norm and unembedding)")
    print(f"  {human_bytes(summary.stored_bytes)} on disk, {_smaller(summary)}, {_per_row(summary)}")
    print()
    head = ("site", "shape", "dtype", "codec", "size", "ratio", "error", "mean KL")
    has_fidelity = any(site.fidelity for site in summary.sites)
    rows = [head, *_site_rows(summary)]
    print(table(rows if has_fidelity else [row[:-1] for row in rows], (4, 5, 6, 7)))
    _print_nonfinite(summary)
    print()
    _print_provenance(summary.provenance)


def _site_rows(summary: Summary) -> list[tuple[str, ...]]:
    return [
        (
            site.name,
            " x ".join(f"{size:,}" for size in site.shape),
            site.dtype,
            site.codec,
            human_bytes(site.stored_bytes),
            f"{site.ratio:.2f}",
            "exact" if site.relative_rms_error is None else f"{site.relative_rms_error:.1e}",
            "-" if site.fidelity is None else f"{site.fidelity.kl_mean:.1e}",
        )
        for site in summary.sites
    ]


def _print_provenance(provenance: Mapping[str, Any]) -> None:
    for key, value in provenance.items():
        if isinstance(value, Mapping) and key != "packages":
            print(f"  {_spelt(key)}")
            for name, item in value.items():
                if item is not None and name != "config_values":  # long, and for the message that names differences
                    print(f"    {_spelt(name)}: {_short(_spelt(item))}")
        elif value is not None:
            print(f"  {_spelt(key)}: {_short(_spelt(value))}")


def _short(text: str) -> str:
    more = f" ... ({len(text):,} characters; --json has them)"
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + more


def _spelt(value: object) -> str:
    """Return a value that a stranger may have written as one line, without codes that a terminal would obey."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_spelt(name)} {_spelt(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_spelt(item) for item in value)
    text = "-" if value is None else str(value)
    return text if text.isprintable() else repr(text)


def print_verification(report: "Verification", *, as_json: bool) -> None:
    """Print what `verify` found."""
    if as_json:
        print_json({**asdict(report), "sound": report.is_sound})
        return
    for problem in report.problems:
        print(f"damaged: {problem.path}: {problem.what}")
    for note in report.notes:
        print(f"note: {note}")
    checked = f"{report.n_files:,} files, {report.n_chunks:,} chunks, {human_bytes(report.n_bytes)} re-hashed"
    print(f"{'sound' if report.is_sound else f'{len(report.problems)} problems'}: {checked}")


def print_reproduction(found: "Reproduction", *, as_json: bool) -> None:
    """Print how a sample of an archive compares with what the model computes now."""
    if as_json:
        print_json({**asdict(found), "exact": found.is_exact})
        return
    rows = [
        (name, f"{site.rows:,}", f"{site.equal_rows:,}", f"{site.largest_error:.1e}", f"{site.largest_value:.1e}")
        for name, site in found.sites.items()
    ]
    print(table([("site", "rows", "equal bit for bit", "largest error", "largest value"), *rows], (1, 2, 3, 4)))
    for difference in found.differences:
        print(f"note: {difference}")
    print("reproduced: every row is equal bit for bit" if found.is_exact else "not equal bit for bit; see the errors")


def print_sites(model: str, sites: "Mapping[str, SiteInfo]", *, as_json: bool) -> None:
    """Print the sites that a model has."""
    if as_json:
        print_json({name: {"row_shape": info.row_shape, "dtype": info.dtype} for name, info in sites.items()})
        return
    rows = [
        (
            name,
            " x ".join("longest example" if n is None else f"{n:,}" for n in info.row_shape or ()),
            str(info.dtype),
            info.where,
        )
        for name, info in sites.items()
    ]
    print(f"{model}: {len(rows)} sites, and module:PATH@output or @input for any other module")
    print(table([("site", "row", "dtype", "read from"), *rows]))
