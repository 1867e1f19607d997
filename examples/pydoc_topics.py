"""Write Python's own documentation topics as a dataset: `pydoc_data.topics`, which every Python has.

    python examples/pydoc_topics.py topics.jsonl

Each line is one topic with its `title` and `text`.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def write_topics(path: Path) -> int:
    """Write every topic as one JSON line to `path`, and return the number of topics."""
    lines = [json.dumps({"title": title, "text": text}) for title, text in sorted(topics.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    print(f"{write_topics(destination)} topics in {destination}")
