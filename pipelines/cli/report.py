"""How commands print: aligned columns for people, one JSON object for machines, and bytes in units that read well."""

import json
from collections.abc import Mapping, Sequence


def print_json(value: object) -> None:
    """Print `value` as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return `rows`, the first of them headings, as aligned columns; columns in `numbers` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def printable(value: object) -> str:
    """Return any value as one line without control characters, which could command the terminal."""
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(name)} {printable(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(printable(item) for item in value)
    text = "-" if value is None else str(value)
    return text if text.isprintable() else repr(text)


def human_bytes(n_bytes: float) -> str:
    """Return `n_bytes` in the binary unit that reads best, for example ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def print_nonfinite(counts: Mapping[str, int]) -> None:
    """Print a warning if a site has NaN or infinite values; `counts` has their number by site."""
    if found := ", ".join(f"{name} {count:,}" for name, count in counts.items() if count):
        print(f"warning: NaN or infinite values, kept as they are: {found}")
