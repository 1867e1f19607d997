"""The examples and sites of an archive in Croissant 1.0 (http://mlcommons.org/croissant/1.0), for search engines.

Croissant knows tables, and its readers load the examples. It has no types for Zarr, so the activations are described as
files, and what opens them is said in words.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from residua.store.base.untrusted import parse_json
from residua.store.examples.index import OWN_COLUMNS
from residua.store.read.summary import Summary
from residua.store.storage.address import HubPlace

CROISSANT = "croissant.json"
_DATE = "datePublished"
_EXTENSIONS = {
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "separator": "cr:separator",
    "samplingRate": "cr:samplingRate",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **_EXTENSIONS,
}
_REPOSITORY, _EXAMPLES, _ACTIVATIONS = "repository", "example-files", "activation-files"


def croissant(
    summary: Summary,
    columns: Mapping[str, pa.DataType],
    place: HubPlace,
    *,
    endpoint: str,
    title: str,
    license: str | None,  # noqa: A002  # as the card names it
    date: str,
    there: bytes = b"",
) -> bytes:
    """Return the Croissant description of an archive in a repository of the Hub, as JSON.

    Args:
        summary: What the archive holds.
        columns: The user's own columns of the examples.
        place: The repository and the folder.
        endpoint: Address of the Hub.
        title: What the archive is, in a line.
        license: Identifier of the licence; None if nobody said it.
        date: The day of publication, as ``2026-01-31``.
        there: What was published there before; its day is kept.
    """
    page, folder = f"{endpoint}{place.page}", f"{place.folder}/" if place.folder else ""
    sites = ", ".join(f"{site.name} {list(site.shape)} {site.dtype}" for site in summary.sites)
    described: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": place.repository.partition("/")[2],
        "description": (
            f"{title}. {summary.rows:,} rows of {summary.n_examples:,} examples. The table has the examples; the "
            f"activations are Zarr v3 arrays in sites/, which residua.open reads: {sites}."
        ),
        "url": page,
        "version": "1.0.0",
        _DATE: _published(there) or date,
        "creator": {"@type": "sc:Organization", "name": place.repository.partition("/")[0]},
        "keywords": ["activations", "interpretability", "residua", "zarr"],
        "identifier": summary.digest,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": _REPOSITORY,
                "name": _REPOSITORY,
                "description": "The repository.",
                "contentUrl": f"{page}/tree/{place.revision}",
                "encodingFormat": "git+https",
                "sha256": "https://github.com/mlcommons/croissant/issues/80",  # as the Hub writes it for repositories
            },
            _files(_EXAMPLES, "The examples.", "application/x-parquet", f"{folder}examples/*.parquet"),
            _files(_ACTIVATIONS, "The activations, Zarr v3.", "application/octet-stream", f"{folder}sites/*"),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "examples",
                "name": "examples",
                "description": (
                    "One record for each example: its tokens, the positions that became rows, and the number of the "
                    "first of these rows, which follow each other in every array."
                ),
                "field": [_field(name, kind) for name, kind in {**OWN_COLUMNS, **columns}.items()],
            }
        ],
    }
    if license is not None:
        described["license"] = license
    return json.dumps(described, indent=2, ensure_ascii=False).encode() + b"\n"


def _files(name: str, description: str, encoding: str, includes: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": description,
        "containedIn": {"@id": _REPOSITORY},
        "encodingFormat": encoding,
        "includes": includes,
    }


def _field(name: str, kind: pa.DataType) -> dict[str, Any]:
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"examples/{name}",
        "name": name,
        "source": {"fileSet": {"@id": _EXAMPLES}, "extract": {"column": name}},
    }
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return {**field, "dataType": _data_type(kind.value_type), "repeated": True}
    return {**field, "dataType": _data_type(kind)}


def _data_type(kind: pa.DataType) -> str:
    known = {
        "sc:Boolean": pa.types.is_boolean,
        "sc:Integer": pa.types.is_integer,
        "sc:Float": pa.types.is_floating,
        "sc:Date": pa.types.is_temporal,
    }
    return next((name for name, holds in known.items() if holds(kind)), "sc:Text")


def _published(there: bytes) -> str:
    try:
        found = parse_json(there or b"{}")
    except ValueError:
        return ""
    date = found.get(_DATE) if isinstance(found, dict) else None
    return date if isinstance(date, str) else ""
