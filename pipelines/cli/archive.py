"""The commands about one archive or model: look at it, check it, pack it, copy it, run a sample of it again."""

import argparse
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    MODEL_HELP,
    WHERE_HELP,
    add_archive,
    add_cluster_flags,
    add_command,
    add_flag,
    add_parallel_flags,
    add_sample_flags,
    add_switch,
    cluster_of,
    is_first_process,
    run_sample,
    shows_progress,
)
from residua.pipelines.cli.progress import StepProgress
from residua.pipelines.cli.report import human_bytes, print_json, print_nonfinite, printable, table
from residua.pipelines.setup.capture_settings import SITES_HELP
from residua.store.base.errors import PlanError
from residua.store.storage.address import is_remote

if TYPE_CHECKING:
    from residua.store.examples.side_tables import SideTable
    from residua.store.read.archive import Archive
    from residua.store.read.summary import SiteSummary, Summary
    from residua.store.sharing.copied import Copied

_ONLY_COMPARED = ("config_values", "settings", "output")  # long, and only needed to show differences
_ADDRESS_HELP = (
    "address: s3://, gs://, az://, http(s)://, hf://datasets/ORG/NAME or hf://buckets/ORG/NAME; credentials come from "
    "where each service's own tools find them"
)
_NEW_HELP = "folder of the new archive, or its address in a bucket; one that was stopped goes on"
_MOST_SHOWN = 400  # characters of one value: the vectors of edits are as long as rows


def add(commands: Any) -> None:
    """Add the commands."""
    text = "show what an archive holds"
    description = "Show the sites of an archive, with shapes, sizes and errors, and how the archive was made."
    add_archive(add_command(commands, "info", _info, text, description))
    text = "check that no byte of an archive is damaged"
    description = (
        "Hash every chunk of an archive again and compare. The exit code is 1 if anything is damaged. If it is "
        "stopped, the same command goes on from there."
    )
    verify = add_command(commands, "verify", _verify, text, description)
    add_archive(verify)
    verify.add_argument("--sample", type=int, metavar="N", help="check only N shards, chosen at random (default: all)")
    verify.add_argument("--threads", type=int, metavar="N", help="threads (default: one a core, up to four)")
    verify.set_defaults(when_stopped="stopped: run the same command again to go on from there.")
    add_switch(verify, "--restart", "begin from the first shard, also after a stop")
    add_cluster_flags(verify, "threads of this process, unless --workers is given")
    text = "make the index that opens a finished archive at once"
    description = (
        "Make the packed index of a finished archive, for example of one of format 1.0. With it, opening costs two "
        "reads whatever the archive's length. No shard is changed. New archives get it when they are finished. With "
        "--for hub, write the same rows into shards of up to 1 GiB instead, which suit the Hub's limits on files and "
        "requests."
    )
    pack = add_command(commands, "pack", _pack, text, description)
    add_archive(pack)
    purpose = "write a new archive with large shards, into --out (default: make the index alone)"
    pack.add_argument("--for", dest="purpose", choices=("hub",), help=purpose)
    text = "with --for, which needs it: folder of the new archive, or its address in a bucket (default: none)"
    add_flag(pack, "--out", text, metavar="FOLDER")
    _add_annotate(commands)
    _add_copies(commands)
    _add_addresses(commands)
    text = "run a sample of an archive again and compare every row"
    description = (
        "Run a random sample of an archive's batches through the model again, and compare every row with the stored "
        "one. The exit code is 1 if any row differs."
    )
    add_sample_flags(add_command(commands, "reproduce", _reproduce, text, description), batches=4)
    text = "measure what the rounding of stored rows does to the model's output"
    description = (
        "Put stored rows of the residual stream, as a lossy codec or data type rounded them, back into the model on a "
        "random sample of batches. Compare the output with that of the unchanged model, site by site. The figures are "
        "kept in the archive, where residua info shows them."
    )
    fidelity = add_command(commands, "fidelity", _fidelity, text, description)
    add_sample_flags(fidelity, batches=16)
    add_parallel_flags(fidelity)
    text = "list the sites of a model"
    description = (
        "List the sites that a model has, with shape and data type of a row. No weights are loaded, unless --weights "
        "is given: then the model runs on a few tokens, which finds the sites that a capture finds."
    )
    sites = add_command(commands, "sites", _sites, text, description)
    sites.add_argument("--model", required=True, help=MODEL_HELP)
    text = "load the weights, and find sites by running the model (default: read the configuration only)"
    sites.add_argument("--weights", action="store_true", help=text)


def _add_annotate(commands: Any) -> None:
    text = "keep labels that came later beside an archive"
    description = (
        "Keep the columns of a file in a side table of an archive, where conditions, probes, top and the loader use "
        "them like columns of the dataset. No file of the capture changes. Without a file: list the side tables."
    )
    parser = add_command(commands, "annotate", _annotate, text, description)
    add_archive(parser)
    parser.add_argument(
        "file",
        nargs="?",
        help="the file, or its address: .csv, .parquet or .jsonl, with a line for each example or row",
    )
    text = "column by which lines are matched: example, row, or a column of the examples such as source_index"
    add_flag(parser, "--key", text, "example", metavar="COLUMN")
    add_flag(parser, "--name", "name of the side table (default: that of the file)")
    add_flag(parser, "--columns", "columns of the file to keep, comma separated (default: all)", metavar="NAMES")
    add_switch(parser, "--replace", "replace the side table of that name")
    add_switch(parser, "--allow-unmatched", "leave out lines that match nothing")
    add_flag(parser, "--remove", "remove the side table of this name (default: none)", metavar="NAME")


def _add_addresses(commands: Any) -> None:
    text = "copy a finished archive to a bucket or the Hub"
    description = (
        "Copy a finished archive, in a folder or at an address, to an address. Every shard is compared with its record "
        "on the way. A copy that was stopped goes on when the same command is run again; residua verify ADDRESS reads "
        "all of it back. On the Hub, a repository is made unless it is there, and gets a card."
    )
    push = add_command(commands, "push", _push, text, description)
    add_archive(push)
    push.add_argument("address", help=_ADDRESS_HELP)
    add_switch(push, "--public", "on the Hub: let everybody see a repository that is made now", "only you see it")
    paths = "keep absolute paths of this machine in the copy's provenance"
    add_switch(push, "--keep-paths", paths, "their last part alone")
    _add_licences(push)
    text = "write the card of an archive: its README.md and croissant.json"
    description = (
        "Write what describes an archive to people, to the viewer of the Hub and to search engines into its folder: "
        "README.md and croissant.json. A README.md that somebody wrote or edited stays. residua push does this on the "
        "Hub by itself."
    )
    card = add_command(commands, "card", _card, text, description)
    add_archive(card)
    address = "address that the card is for, hf://datasets/ORG/NAME[/FOLDER] (default: ORG/NAME to fill in)"
    card.add_argument("--address", metavar="ADDRESS", help=address)
    add_switch(card, "--print", "print the README.md, and write nothing")
    add_switch(card, "--force", "write over a README.md that somebody edited")
    _add_licences(card)
    text = "copy an archive from an address, whole or some sites of it"
    description = (
        "Copy an archive from an address into a folder. Every chunk is compared with the archive's index when it "
        "arrives. A copy that was stopped goes on when the same command is run again."
    )
    pull = add_command(commands, "pull", _pull, text, description)
    pull.add_argument("address", help=_ADDRESS_HELP)
    pull.add_argument("out", help="folder of the copy, which is made")
    add_flag(pull, "--sites", f"{SITES_HELP} (default: all)")


def _add_licences(parser: argparse.ArgumentParser) -> None:
    licence = "as the card gives it, such as cc-by-4.0 (default: the card says that it is not known)"
    for flag, what in (("--license", "activations"), ("--model-license", "model"), ("--text-license", "text")):
        add_flag(parser, flag, f"licence of the {what}, {licence}")


def _add_copies(commands: Any) -> None:
    """Add the commands that write a part of an archive elsewhere."""
    text = "take examples, rows or sites of an archive into a new one"
    description = "Write a subset of an archive as a new archive. Rows keep their values, tokens and texts."
    extract = add_command(commands, "extract", _extract, text, description)
    add_archive(extract)
    add_flag(extract, "--out", _NEW_HELP, required=True)
    add_flag(extract, "--examples", "numbers of examples, such as 3,7,10-19 (default: all)", metavar="NUMBERS")
    add_flag(extract, "--rows", WHERE_HELP, metavar="CONDITION")
    add_flag(extract, "--sites", "sites to take, such as resid_post.* (default: all)")
    text = "join archives of the same model and sites over several datasets"
    description = (
        "Write the rows of several archives, one after the other, as a new archive. Rows keep their values, tokens and "
        "texts; the columns source_archive and source_example say where each example is from."
    )
    concat = add_command(commands, "concat", _concat, text, description)
    concat.add_argument("archives", nargs="+", help="folders or addresses of the archives, in the order of their rows")
    add_flag(concat, "--out", _NEW_HELP, required=True)
    add_flag(concat, "--sites", "sites to keep, such as resid_post.* (default: all)")
    text = "write rows of an archive as Parquet, safetensors, npy or a dataset"
    description = "Write rows of some sites, with their tokens, into files that other programs read."
    export = add_command(commands, "export", _export, text, description)
    add_archive(export)
    add_flag(export, "--out", "file or folder to write, or its address in a bucket", required=True)
    export.add_argument("--to", required=True, choices=("parquet", "safetensors", "npy", "hf"), help="the format")
    add_flag(export, "--rows", WHERE_HELP, metavar="CONDITION")
    add_flag(export, "--sites", "sites to write, such as resid_post.7 (default: all)")


def _extract(options: argparse.Namespace) -> int:
    from residua.pipelines.copies.extract import extract
    from residua.store.selection.grammar import parse_numbers

    examples = None if options.examples is None else parse_numbers(options.examples, "--examples")
    with StepProgress("row", shown=shows_progress(options)) as progress:
        made = extract(
            options.archive,
            options.out,
            examples=examples,
            rows=options.rows,
            sites=options.sites,
            on_row=progress.step,
        )
    return _print_made(options, made)


def _concat(options: argparse.Namespace) -> int:
    from residua.pipelines.copies.concat import concat

    with StepProgress("row", shown=shows_progress(options)) as progress:
        made = concat(options.archives, options.out, sites=options.sites, on_row=progress.step)
    return _print_made(options, made)


def _print_made(options: argparse.Namespace, made: "Archive") -> int:
    n_examples = len(made.example_table)
    found = {"archive": made.place, "rows": made.n_rows, "examples": n_examples, "sites": made.sites}
    if options.json:
        print_json(found)
    else:
        print(f"{made.place}: {made.n_rows:,} rows of {n_examples:,} examples, {len(made)} sites")
    return 0


def _export(options: argparse.Namespace) -> int:
    from residua.pipelines.copies.export import export

    with StepProgress("row", shown=shows_progress(options)) as progress:
        made = export(
            options.archive, options.out, to=options.to, sites=options.sites, rows=options.rows, on_row=progress.step
        )
    print_json({"out": str(made)}) if options.json else print(f"written: {made}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from residua.store.read.stacks import open_archive
    from residua.store.read.summary import summarise

    archive = open_archive(options.archive)
    if archive.stacks and options.json:
        print_json({"stacks": {name: summarise(one).to_json() for name, one in archive.stacks.items()}})
    elif options.json:
        print_json(summarise(archive).to_json())
    else:
        for number, one in enumerate(archive.stacks.values() or [archive]):
            print("\n" * bool(number), end="")
            _print_info(summarise(one))
    return 0


def _print_info(summary: "Summary") -> None:
    total = summary.rows if summary.total_rows is None else summary.total_rows
    if summary.sealed:
        state = "sealed"
    elif summary.finished:
        state = f"damaged: {summary.rows:,} of {total:,} rows are left, see residua verify"
    else:
        state = f"not sealed: {summary.rows:,} of {total:,} rows are captured"
    print(f"{summary.path}  ({state})")
    print(f"  {total:,} rows, {summary.n_examples:,} examples, {summary.n_tokens:,} tokens")
    print(f"  columns of the examples: {', '.join(map(printable, summary.columns)) or 'none'}")
    for name, columns in summary.side_tables.items():
        print(f"  of these, from the side table {name}: {', '.join(map(printable, columns))}")
    shards = f"{summary.shards}" if summary.sealed else f"{summary.shards} of {summary.total_shards or '?'}"
    word = "shard" if shards == "1" else "shards"
    print(f"  {shards} {word} of {summary.rows_per_shard:,} rows, plan {summary.digest[:12]}")
    print(f"  {'with' if summary.has_head else 'without'} the model's final norm and unembedding")
    print(f"  {human_bytes(summary.stored_bytes)} on disk, {compression(summary)}")
    print()
    heading = ("site", "shape", "dtype", "codec", "size", "ratio", "error", "mean KL")
    rows = [
        (
            site.name,
            " x ".join(f"{size:,}" for size in site.shape),
            site.dtype,
            site.codec,
            human_bytes(site.stored_bytes),
            f"{site.ratio:.2f}",
            rounding(site),
            "-" if site.fidelity is None else f"{site.fidelity.kl_mean:.1e}",
        )
        for site in summary.sites
    ]
    n_columns = len(heading) if any(site.fidelity for site in summary.sites) else len(heading) - 1
    print(table([row[:n_columns] for row in (heading, *rows)], (4, 5, 6, 7)))
    print_nonfinite({site.name: site.n_nonfinite for site in summary.sites})
    print()
    _print_provenance(summary.provenance)
    for note in summary.notes:
        print(f"note: {printable(note)}")


def rounding(site: "SiteSummary") -> str:
    """Return how a site's stored values differ from those that the model computed, in a word or a number."""
    if site.relative_rms_error is None:
        return "exact" if site.cast_from is None else f"cast from {site.cast_from}"
    error = f"{site.relative_rms_error:.1e}"
    return error if site.cast_from is None else f"{error}, cast from {site.cast_from}"


def compression(summary: "Summary") -> str:
    """Return how much space an archive takes, in words."""
    per_row = summary.stored_bytes / max(1, summary.rows)
    return f"{per_row:,.0f} bytes a token, {summary.ratio:.2f} times smaller than in memory"


def _print_provenance(provenance: Mapping[str, Any]) -> None:
    for key, value in provenance.items():
        if key == "notes":
            continue
        if isinstance(value, Mapping) and key != "packages":
            print(f"  {printable(key)}")
            for name, item in value.items():
                if item is not None and name not in _ONLY_COMPARED:
                    print(f"    {printable(name)}: {_short(printable(item))}")
        elif value is not None:
            print(f"  {printable(key)}: {_short(printable(value))}")


def _short(text: str) -> str:
    more = f" ... ({len(text):,} characters; --json has them)"
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + more


def _verify(options: argparse.Namespace) -> int:
    from residua.store.verification.verify import verify

    checkpoint = _checkpoint_of(options.archive)
    if options.sample is not None:
        options.when_stopped = "stopped: another sample begins anew."
    if options.restart:
        checkpoint.unlink(missing_ok=True)
    with ExitStack() as stack:
        is_shared = options.workers is not None or options.scheduler not in (None, "inline")
        cluster = stack.enter_context(cluster_of(options, shows=False)) if is_shared else None
        progress = stack.enter_context(StepProgress("shard", shown=shows_progress(options)))
        report = verify(
            options.archive,
            sample=options.sample,
            threads=options.threads,
            cluster=cluster,
            checkpoint=checkpoint,
            on_shard=progress.step,
        )
    if options.json:
        print_json({**asdict(report), "sound": report.is_sound})
    else:
        for problem in report.problems:
            print(f"damaged: {problem.path}: {problem.what}")
        for note in report.notes:
            print(f"note: {note}")
        checked = f"{report.n_files:,} files, {report.n_chunks:,} chunks, {human_bytes(report.n_bytes)} hashed again"
        print(f"{'sound' if report.is_sound else f'{len(report.problems)} problems'}: {checked}")
    return 0 if report.is_sound else 1


def _checkpoint_of(archive: str) -> Path:
    """Return the user's file that says where the verification of an archive was stopped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = archive if is_remote(archive) else str(Path(archive).resolve())
    return cache / "residua" / f"verify-{sha256(place.encode()).hexdigest()[:16]}.json"


def _pack(options: argparse.Namespace) -> int:
    from residua.store.read.stacks import open_archive
    from residua.store.sealing.packed_index import INDEX
    from residua.store.sealing.seal import pack

    if (options.purpose is None) != (options.out is None):
        raise PlanError("--for hub and --out FOLDER go together: the archive itself stays as it is")
    if options.purpose is not None:
        return _repack(options)
    with StepProgress("shard", shown=shows_progress(options)) as progress:
        pack(options.archive, on_shard=progress.step)
    archive = open_archive(options.archive)
    place, n_bytes = f"{archive.place}/{INDEX}", int(str((archive.metadata.index or {})["n_bytes"]))
    if options.json:
        print_json({"index": place, "n_bytes": n_bytes})
    else:
        print(f"packed: {place} ({human_bytes(n_bytes)})")
    return 0


def _repack(options: argparse.Namespace) -> int:
    from residua.pipelines.copies.repack import repack

    with StepProgress("row", shown=shows_progress(options)) as progress:
        made = repack(options.archive, options.out, on_row=progress.step)
    shards, height = len(made.commits), made.plan.rows_per_shard
    if options.json:
        print_json({"archive": made.place, "shards": shards, "rows_per_shard": height})
    else:
        print(f"{made.place}: {made.n_rows:,} rows in {shards:,} shards of {height:,} rows")
    return 0


def _push(options: argparse.Namespace) -> int:
    from residua.store.sharing.push import push

    with StepProgress("B", shown=shows_progress(options)) as progress:
        copied = push(
            options.archive,
            options.address,
            public=options.public,
            license=options.license,
            model_license=options.model_license,
            text_license=options.text_license,
            keep_paths=options.keep_paths,
            on_bytes=progress.step,
        )
    return _print_copied(options, copied, "sent")


def _card(options: argparse.Namespace) -> int:
    from residua.store.sharing.card import Licences, card_of, write_card

    licences = Licences(data=options.license, model=options.model_license, text=options.text_license)
    if options.print:
        text = card_of(options.archive, address=options.address, licences=licences).text
        print_json({"text": text}) if options.json else print(text, end="")
        return 0
    path = write_card(options.archive, address=options.address, licences=licences, force=options.force)
    print_json({"out": str(path)}) if options.json else print(f"written: {path}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from residua.store.sharing.pull import pull

    with StepProgress("B", shown=shows_progress(options)) as progress:
        copied = pull(options.address, options.out, sites=options.sites, on_bytes=progress.step)
    return _print_copied(options, copied, "fetched")


def _print_copied(options: argparse.Namespace, copied: "Copied", verb: str) -> int:
    if options.json:
        print_json(asdict(copied))
    else:
        there = copied.n_bytes - copied.sent_bytes
        also = f", {human_bytes(there)} were there already" if there else ""
        print(f"{copied.n_files:,} files, {human_bytes(copied.n_bytes)}: {human_bytes(copied.sent_bytes)} {verb}{also}")
        for note in copied.notes:
            print(f"note: {note}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from residua.pipelines.capture.reproduce import reproduce

    found = run_sample(options, reproduce, shown=True)
    if options.json:
        print_json({**asdict(found), "exact": found.is_exact})
        return 0 if found.is_exact else 1
    rows = [
        (name, f"{site.rows:,}", f"{site.equal_rows:,}", f"{site.largest_error:.1e}", f"{site.largest_value:.1e}")
        for name, site in found.sites.items()
    ]
    print(table([("site", "rows", "equal bit for bit", "largest error", "largest value"), *rows], (1, 2, 3, 4)))
    for difference in found.differences:
        print(f"note: {difference}")
    print("reproduced: every row is equal bit for bit" if found.is_exact else "not equal bit for bit; see the errors")
    return 0 if found.is_exact else 1


def _fidelity(options: argparse.Namespace) -> int:
    from residua.pipelines.replay.fidelity import fidelity

    is_first = is_first_process()
    found = run_sample(options, fidelity, shown=is_first, tp=options.tp, pp=options.pp)
    if is_first and options.json:
        print_json(asdict(found))
    elif is_first:
        rows = [
            (name, f"{site.kl_mean:.2e}", f"{site.kl_max:.2e}", f"{100 * site.top1_agreement:.2f} %")
            for name, site in found.sites.items()
        ]
        of_tokens, note = _what_diverges(options.archive)
        n_tokens = f", {found.n_tokens:,} tokens" if of_tokens else ""
        each = "a token" if of_tokens else "an example"
        print(f"{found.n_examples:,} examples{n_tokens}; KL divergence in nats {each}")
        print(table([("site", "mean KL", "largest KL", "same top 1"), *rows], (1, 2, 3)))
        if note:
            print(f"note: {note}")
    return 0


def _what_diverges(archive: str) -> tuple[bool, str]:
    """Return whether a model's logits are of tokens, and what they are of if not of the next one, as a sentence."""
    from residua.store.format.archive_metadata import said_of
    from residua.store.read.stacks import main_archive, open_archive

    predicts = said_of("model", main_archive(open_archive(archive)).provenance).get("predicts")
    if predicts == "tokens":
        return True, (
            "the model's logits are not those of the next token: the divergence is of what it gives for each token of "
            "the text as it was captured"
        )
    if predicts == "examples":
        return False, "the model's logits are of an example as a whole: the divergence is of these"
    return True, ""


def _sites(options: argparse.Namespace) -> int:
    from residua.capture.sites.architectures import family_of
    from residua.capture.sites.names_to_modules import model_sites
    from residua.capture.sites.stacks import is_encoder_decoder
    from residua.pipelines.setup.capture_settings import CaptureSettings
    from residua.pipelines.setup.models import load_empty_model, load_model

    model = load_model(options.model, CaptureSettings()) if options.weights else load_empty_model(options.model)
    sites = model_sites(model)
    if options.json:
        print_json({name: {"row_shape": info.row_shape, "dtype": info.dtype} for name, info in sites.items()})
        return 0
    rows = [
        (
            name,
            " x ".join("longest example" if n is None else f"{n:,}" for n in info.row_shape or ()),
            str(info.dtype),
            info.where,
        )
        for name, info in sites.items()
    ]
    print(f"{options.model}: {len(rows)} sites, and module:PATH@output or module:PATH@input for any other module")
    print(table([("site", "row", "dtype", "read from"), *rows]))
    if not options.weights and (is_encoder_decoder(model) or family_of(model.config) is None):
        print(
            f"note: {model.config.model_type} is not in the table of architectures, and its weights were not loaded: a "
            "capture finds more sites by running the model. --weights lists them"
        )
    return 0


def _annotate(options: argparse.Namespace) -> int:
    from residua.store.read.stacks import open_archive

    archive = open_archive(options.archive)
    if options.file is not None and options.remove is not None:
        raise PlanError(f"{options.file} was to be added, and {options.remove} to be removed: run one after the other")
    if options.remove is not None:
        archive.remove_annotations(options.remove)
    if options.file is not None:
        added = archive.annotate(
            options.file,
            key=options.key,
            name=options.name or Path(options.file).stem,
            columns=options.columns.split(",") if options.columns else None,
            replace=options.replace,
            allow_unmatched=options.allow_unmatched,
        )
        _print_side_tables(options, [added])
        return 0
    _print_side_tables(options, archive.side_tables)
    return 0


def _print_side_tables(options: argparse.Namespace, tables: "tuple[SideTable, ...] | list[SideTable]") -> None:
    if options.json:
        print_json({"side_tables": [{**each.to_json(), "digest": each.digest} for each in tables]})
        return
    for each in tables:
        columns = ", ".join(f"{name} ({kind})" for name, kind in each.columns.items())
        print(f"{each.name}, by {printable(each.key)}: {printable(columns)}")
        for note in each.notes:
            print(f"note: {printable(note)}")
    if not tables:
        print("no side tables")
