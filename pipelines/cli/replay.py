"""The command `replay`: the examples of an archive through the model again, with edits."""

import argparse
from typing import TYPE_CHECKING, Any

from residua.pipelines.cli.options import (
    CAPTURED_MODEL_HELP,
    add_archive,
    add_command,
    add_device,
    add_flag,
    add_parallel_flags,
    add_results,
    add_switch,
    is_first_process,
    parse_tokens,
    shows_progress,
)
from residua.pipelines.cli.progress import CaptureProgress, StepProgress
from residua.pipelines.cli.report import print_json
from residua.pipelines.jobs.stopping import stopping_in_time
from residua.store.selection.grammar import parse_numbers

if TYPE_CHECKING:
    from residua.pipelines.replay.replay import ReplayResult


def add(commands: Any) -> None:
    """Add the command."""
    text = "put stored rows back into the model with edits, and measure what changes"
    description = (
        "Run the examples of an archive through the model with edits and without, starting from stored rows if --at is "
        "given. Writes what the edits change, per token and per example, as tables."
    )
    parser = add_command(commands, "replay", _replay, text, description)
    add_archive(parser)
    parser.add_argument("--model", required=True, help=CAPTURED_MODEL_HELP)
    add_results(parser, "the tables, which is resumed if it is unfinished", None)
    add_flag(parser, "--edit", "YAML or JSON file with the edits, or its address (default: no edits)", metavar="FILE")
    text = "sites, comma separated, where stored rows replace computed ones, such as resid_post.5 (default: none)"
    add_flag(parser, "--at", text)
    text = "sites of the edited run to store in OUT/acts.zarr, comma separated, with patterns (default: none)"
    add_flag(parser, "--capture", text)
    add_flag(parser, "--dtype", "data type to store them in, such as float16 (default: that of the archive)")
    add_flag(parser, "--codec", "codec preset for them, such as fast (default: that of the archive)")
    add_flag(parser, "--examples", "numbers of the examples, such as 3,7,10-19 (default: all)")
    add_flag(parser, "--rows", "only examples that own these rows, such as 0-99,512 (default: all)")
    text = "only examples with a row that meets this condition, such as 'label == \"code\"' (default: all)"
    add_flag(parser, "--where", text)
    text = "tokens whose logits are added to the tables, as ids or texts: '17, the' (default: none)"
    add_flag(parser, "--tokens", text)
    add_device(parser)
    add_parallel_flags(parser)
    add_switch(parser, "--force", "accept a model other than the captured one, and note it in the results")
    parser.set_defaults(when_stopped="stopped: finished files are safe. Run the same command again to go on.")


def _replay(options: argparse.Namespace) -> int:
    from residua.pipelines.replay.replay import replay_dataset

    is_first = is_first_process()
    shown = is_first and shows_progress(options)
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
            dtype=options.dtype,
            codec=options.codec,
            examples=None if options.examples is None else parse_numbers(options.examples, "--examples"),
            rows=None if options.rows is None else parse_numbers(options.rows, "--rows"),
            where=options.where,
            tokens=parse_tokens(options.tokens, "--tokens") if options.tokens else (),
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
        archive = None if found.archive is None else found.archive.place
        result = {"folder": str(found.folder), "archive": archive, "examples": found.n_examples}
        print_json({**result, "notes": list(found.notes), **means})
        return
    for note in found.notes:
        print(f"note: {note}")
    print(f"examples  {found.n_examples:,}")
    print(f"KL        {means['kl']:.4g} nats a token, at most {means['kl_max']:.4g}")
    if means["loss"] is not None:
        print(f"loss      {means['loss']:.4f}, without edits {means['unedited_loss']:.4f}: {means['loss_change']:+.4f}")
    print(f"top 1     the same for {100 * (means['top1_agreement'] or 0):.1f} % of tokens")
    if found.archive is not None:
        print(f"captured  {len(found.archive)} sites of {found.archive.n_rows:,} rows: {found.archive.place}")
    print(f"files     {found.folder}: examples/, tokens/, residua.json")


def _means(columns: dict[str, list[Any]]) -> dict[str, float | None]:
    """Return means over the tokens of all examples that have a value, and the largest KL divergence."""
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
