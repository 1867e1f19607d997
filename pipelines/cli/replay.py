"""The sub-command `residua replay`: a whole archive through the model again, with edits."""

import argparse
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.job import add_archive, add_job, add_split_flags, speaks_for_all
from residua.pipelines.cli.lists import tokens
from residua.pipelines.cli.progress import CaptureProgress, StepProgress
from residua.pipelines.cli.report import print_json
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.selection.grammar import parse_numbers

if TYPE_CHECKING:
    from residua.pipelines.replay.replay import ReplayResult


def add(jobs: Any) -> None:
    """Add the sub-command."""
    parser = add_job(jobs, "replay", _replay, "put stored rows back into the model with edits, and tell what changes")
    add_archive(parser)
    parser.add_argument("--model", required=True, help="hub id or folder of the model that was captured")
    parser.add_argument("--edit", metavar="FILE", help="YAML or JSON file with the edits; default: none")
    parser.add_argument(
        "--out", dest="folder", required=True, help="folder of the tables; if it exists, the run goes on"
    )
    parser.add_argument("--at", metavar="STR", help="where stored rows go in, resid_post.5 say; default: nowhere")
    parser.add_argument("--capture", metavar="STR", help="sites of the edited run to capture, into OUT/acts.zarr")
    parser.add_argument("--examples", metavar="STR", help="numbers of examples: 3,7,10-19; default: all")
    parser.add_argument("--rows", metavar="STR", help="only examples that own these rows, 0-99,512 say")
    parser.add_argument("--where", metavar="STR", help="only examples with such rows, for example 'label == \"code\"'")
    parser.add_argument("--tokens", metavar="STR", help="tokens whose logits are told, as ids or texts: '17, the'")
    parser.add_argument("--device", default="auto", metavar="STR", help="device of the model: auto, cpu, cuda, ...")
    add_split_flags(parser)
    parser.add_argument("--force", action="store_true", help="take another model than was captured, and note it")
    parser.set_defaults(when_stopped="stopped: finished parts are safe. Run the same command again to go on.")


def _replay(options: argparse.Namespace) -> int:
    from residua.pipelines.replay.replay import replay_dataset

    is_first = speaks_for_all()
    shown = is_first and not options.json
    with (
        stopping_in_time(),
        StepProgress("example", shown=shown) as progress,
        CaptureProgress(shown=shown) as capture_progress,
    ):
        found = replay_dataset(
            options.model,
            options.archive,
            out=options.folder,
            edits=() if options.edit is None else options.edit,
            at=None if options.at is None else options.at.split(","),
            capture=options.capture,
            examples=None if options.examples is None else parse_numbers(options.examples, "--examples"),
            rows=None if options.rows is None else parse_numbers(options.rows, "--rows"),
            where=options.where,
            tokens=tokens(options.tokens, "--tokens") if options.tokens else (),
            force=options.force,
            device=options.device,
            tp=options.tp,
            pp=options.pp,
            command=options.command_line,
            on_example=progress.step,
            on_plan=capture_progress.plan,
            on_batch=capture_progress.batch,
        )
    if is_first:
        _print(found, as_json=options.json)
    return 0


def _print(found: "ReplayResult", *, as_json: bool) -> None:
    means = _means(found.examples.to_pydict())
    if as_json:
        archive = None if found.archive is None else str(found.archive.path)
        said = {"folder": str(found.folder), "archive": archive, "examples": found.n_examples}
        print_json({**said, "notes": list(found.notes), **means})
        return
    for note in found.notes:
        print(f"note: {note}")
    print(f"examples  {found.n_examples:,}")
    print(f"KL        {means['kl']:.4g} nats a token, at most {means['kl_max']:.4g}")
    if means["loss"] is not None:
        print(f"loss      {means['loss']:.4f}, without edits {means['unedited_loss']:.4f}: {means['loss_change']:+.4f}")
    print(f"top 1     the same for {100 * (means['top1_agreement'] or 0):.1f} % of tokens")
    if found.archive is not None:
        print(f"captured  {len(found.archive)} sites of {found.archive.n_rows:,} rows: {found.archive.path}")
    print(f"files     {found.folder}: examples/, tokens/, residua.json")


def _means(columns: dict[str, list[Any]]) -> dict[str, float | None]:
    """Return means over tokens, of examples that have a value, and the largest KL."""
    found: dict[str, float | None] = {"kl_max": max(columns["kl_max"])}
    for name in ("kl", "top1_agreement", "loss", "unedited_loss", "loss_change"):
        of_next = "loss" in name
        pairs = [
            (value, n_tokens - of_next)
            for value, n_tokens in zip(columns[name], columns["n_tokens"], strict=True)
            if value is not None
        ]
        count = sum(weight for _, weight in pairs)
        found[name] = sum(value * weight for value, weight in pairs) / count if count else None
    return found
