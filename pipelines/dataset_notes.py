"""What became of a dataset, in sentences: nothing is cut or left out without one."""

from residua.pipelines.dataset_settings import DatasetReport


def dataset_notes(report: DatasetReport) -> list[str]:
    """Return one sentence for each thing that was cut, split or left out of the dataset."""
    truncated = f"{report.n_truncated:,} texts were truncated and lost {report.n_truncated_tokens:,} tokens"
    said = [
        (report.n_split, f"{report.n_split:,} of {report.n_sources:,} texts were longer than an example may be: split"),
        (report.n_truncated, truncated),
        (report.n_padding, f"{report.n_padding:,} padding tokens of the dataset were taken off"),
        (report.n_empty, f"{report.n_empty:,} texts have no token and were left out"),
        (report.n_short, f"{report.n_short:,} examples are shorter than --min-length and were left out"),
        (report.n_without_rows, f"{report.n_without_rows:,} examples keep no position and were left out"),
        (
            report.cut_at_max_tokens,
            f"--max-tokens ended the reading; the last example lost {report.n_cut_tokens:,} tokens",
        ),
    ]
    return [sentence for count, sentence in said if count]
