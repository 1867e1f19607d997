"""Where a browser finds rows of an archive on a web server: which bytes of which file, for sites of codec `raw`.

A chunk of another codec would have to be decoded, which browsers cannot do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from residua.analysis.page.measures import ShownRows
from residua.store.encoding.codecs import PRESETS
from residua.store.encoding.shard import shard_path
from residua.store.read.archive import Archive
from residua.store.sealing.packed_index import PackedIndex
from residua.store.storage.address import shown as without_secrets

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def ranges_of(archive: Archive, site: str, rows: Sequence[ShownRows]) -> dict[str, Any] | None:
    """Return where the shown rows of a site lie, or None if a browser cannot read them.

    Args:
        archive: A sealed archive; only of one at http:// or https:// is there anything to fetch.
        site: The site.
        rows: The rows.

    Returns:
        ``url`` (a file's, with ``{shard}`` for the number of the shard), ``dtype`` and ``row_bytes`` of a row,
        ``rows_per_shard``, ``rows_per_chunk``, and ``chunk_bytes``, what a stored chunk takes with its checksum.
    """
    plan = archive.plan.site(site)
    is_web = archive.place.startswith(("http://", "https://"))
    if not is_web or not isinstance(archive.commits, PackedIndex) or plan.dtype not in _DTYPES:
        return None
    specs = archive[site].specs
    if len(specs) != 1 or specs[0].column_shards != 1 or not PRESETS[specs[0].preset].is_raw:
        return None
    (spec,) = specs
    shards = np.unique([row // spec.rows_per_shard for start, stop in rows for row in (start, max(start, stop - 1))])
    sizes = {int(size) for shard in shards.tolist() for size in archive.commits.chunk_table(spec.key, shard)[:, 0]}
    if len(sizes) != 1:
        return None
    inside = shard_path(archive.path, spec, 0).relative_to(archive.path).as_posix()
    head, tail = inside.removeprefix(spec.path).split("/0", 1)
    return {
        "url": f"{without_secrets(archive.place).rstrip('/')}/{spec.path}{head}/{{shard}}{tail}",
        "dtype": plan.dtype,
        "row_bytes": spec.row_bytes,
        "rows_per_shard": spec.rows_per_shard,
        "rows_per_chunk": spec.rows_per_chunk,
        "chunk_bytes": sizes.pop(),
    }
