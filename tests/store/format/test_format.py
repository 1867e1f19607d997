"""The format page against the code: every table, list and example of `store/FORMAT.md` says what the code does."""

import hashlib
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

import residua
from residua.capture.sites.names_to_modules import resolve_sites
from residua.pipelines.data.dataset import SOURCE_COLUMNS
from residua.store.encoding.codecs import INT8, PRESETS, BitRound, codecs_metadata
from residua.store.encoding.dtypes import STORAGE_DTYPES
from residua.store.encoding.shard import INDEX_CODECS, INDEX_LOCATION
from residua.store.examples.index import OWN_COLUMNS
from residua.store.examples.side_tables import KINDS, SIDE_TABLES
from residua.store.format.archive_metadata import FORMAT, SIDECAR_FOLDERS, Metadata
from residua.store.format.array_metadata import open_array
from residua.store.format.commits import FOLDER, Commit, ShardFile
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.row_columns import IMAGE_COLUMNS, MODALITIES, ROW_COLUMNS
from residua.store.format.sidecars import FIDELITY_FILE, Fidelity, SiteFidelity, read_fidelity, write_fidelity
from residua.store.format.site_names import LAYER_KINDS, MODEL_KINDS, parse_site
from residua.store.read.archive import Archive
from residua.store.sealing.packed_index import HEADER, INDEX, LOSS, TOTALS
from tests.models.tiny import TINY
from tests.pages import ROOT, blocks
from tests.store.small_archive import make_archive

PAGE = (ROOT / "store" / "FORMAT.md").read_text()
Table = list[list[str]]


def read_tables(page: str) -> dict[str, Table]:
    """Return the rows of every Markdown table, as cells, by the first cell of its head."""
    tables: dict[str, Table] = {}
    rows: Table = []
    for line in page.splitlines():
        if not line.startswith("|"):
            rows = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not rows:
            rows = tables.setdefault(cells[0], [])
            rows.append(cells)
        elif not set(line) <= set("|- "):
            rows.append(cells)
    return {name: table[1:] for name, table in tables.items()}


def codes(text: str) -> list[str]:
    """Return what stands between backquotes."""
    return re.findall(r"`([^`]+)`", text)


def sentence(start: str) -> str:
    """Return what follows `start` on the page, up to the end of the sentence, on one line."""
    assert PAGE.count(start) == 1, f"the page should say {start!r} once"
    return re.split(r"\.\s", PAGE.split(start)[1])[0].replace("\n", " ")


TABLES = read_tables(PAGE)
PLAN = Plan(
    model={},
    dataset={},
    rules={},
    sites=(SitePlan(name="resid_post.7", row_shape=(40,), dtype="float32", codec=INT8),),
    rows_per_shard=8,
)
FILE = ShardFile(n_bytes=1, digest="ab" * 32, chunks=bytes(8))
COMMIT = Commit(plan=PLAN.digest, shard=3, rows=(24, 32), arrays={"sites/resid_post/7": FILE})


def test_every_table_of_the_page_is_compared_here() -> None:
    assert set(TABLES) == {
        "name",
        "column of the rows",
        "preset",
        "key",
        "field of the plan",
        "key of a file",
        "key of a site's fidelity",
        "key of a side table",
    }


def test_the_version_is_that_of_the_code() -> None:
    assert PAGE.startswith(f"# The archive format, version {FORMAT}\n")
    (row,) = (row for row in TABLES["key"] if codes(row[0]) == ["format"])
    assert codes(row[1]) == [json.dumps(FORMAT)]


def test_the_keys_of_the_entry() -> None:
    entry = Metadata(plan=PLAN, provenance={}).to_json()
    assert [codes(row[0]) for row in TABLES["key"]] == [[key] for key in entry]
    assert entry["digest"] == PLAN.digest
    (files,) = (row[1] for row in TABLES["key"] if codes(row[0]) == ["files"])
    assert codes(files) == [f"{folder}/" for folder in SIDECAR_FOLDERS]


def test_the_keys_of_sealed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with residua.Recorder(model, sites="module:0@output", out=tmp_path / "a.zarr"), torch.no_grad():
        model(torch.zeros(4, 3))
    sealed = Archive(tmp_path / "a.zarr").metadata.sealed
    assert sealed is not None
    (row,) = (row for row in TABLES["key"] if codes(row[0]) == ["sealed"])
    assert codes(row[1]) == list(sealed)


def test_the_fields_of_the_plan_and_of_its_sites() -> None:
    plan = PLAN.to_json()
    assert [codes(row[0]) for row in TABLES["field of the plan"]] == [[field] for field in plan]
    words = {codes(row[0])[0]: codes(row[1]) for row in TABLES["field of the plan"]}
    (site,) = plan["sites"] if isinstance(plan["sites"], list) else []
    assert isinstance(site, dict)
    assert words["sites"] == list(site)
    for padding in words["padding"]:
        assert Plan.from_json({**plan, "padding": padding}).padding == padding
    assert len(words["padding"]) == 2


def test_the_keys_of_a_commit() -> None:
    (example,) = blocks("store/FORMAT.md", language="json")
    record = json.loads(example)
    assert record.keys() == {"record", "sha256"}
    assert list(record["record"]) == list(COMMIT.to_json())
    assert list(record["record"]["arrays"]["sites/resid_post/7"]) == list(FILE.to_json())
    named = [code for row in TABLES["key of a file"] for code in codes(row[0])]
    assert named == [field.name for field in fields(ShardFile)]
    pattern = "SSSSSSSS-WWWW.json"
    assert f"`{FOLDER}/{pattern}`" in PAGE
    assert COMMIT.name == pattern.replace("SSSSSSSS", "00000003").replace("WWWW", "0000")


def test_the_packed_index() -> None:
    text = PAGE.split("## The packed index")[1].split("## Fidelity")[0]
    assert "8 bytes `RESIDUA` and 1; uint32 bytes of a page; uint32 *F*" in text
    assert HEADER.size == 8 + 4 + 4 + 3 * 8 + 32
    assert f"{TOTALS.itemsize} bytes of sums over all shards" in text
    assert f"*L* losses of {LOSS.itemsize} bytes" in text
    for name in {*(TOTALS.names or ()), *(LOSS.names or ())} - {"n_losses", "shard"}:
        assert f"`{name}`" in text


def with_numbers(name: str) -> str:
    """Return the page's name of a site with numbers for its capital letters."""
    return re.sub(r"\.N$", ".1", re.sub(r"\.L$", ".7", name)).replace("topK", "top8")


def test_the_sites_and_their_paths() -> None:
    kinds = set()
    for names, path, _ in TABLES["name"]:
        sites = [parse_site(with_numbers(name)) for name in codes(names)]
        assert codes(path)[0] in {site.path for site in sites}
        for site, name in zip(sites, codes(names), strict=True):
            kinds.add(site.kind)
            assert (site.layer is not None) == name.endswith(".L")
            if site.kind != "module":
                assert site.path == "sites/" + with_numbers(name).replace(".", "/")
    assert kinds == {*LAYER_KINDS, *MODEL_KINDS, "logits_top8", "module"}


def test_the_shapes_of_rows_have_as_many_axes_as_the_page_says() -> None:
    model = TINY["llama"]()
    for names, _, shape in TABLES["name"]:
        for name in (re.sub(r"\.L$", ".1", name).replace("topK", "top8") for name in codes(names)):
            if not name.startswith(
                ("module:", "cross_", "mixer_", "kv_latent", "router_", "expert_", "routed_", "shared_")
            ):  # which llama does not have
                (info,) = resolve_sites(model, name).values()
                assert info.row_shape is not None
                assert len(info.row_shape) == len(shape.split(";")[0].split(",")), name


def test_the_presets() -> None:
    named = {name: row for row in TABLES["preset"] for name in codes(row[0])}
    assert list(named) == list(PRESETS)
    for name, (_, pipeline, loses) in named.items():
        assert (loses == "nothing") == PRESETS[name].is_lossless
        base = codes(pipeline)
        if base:
            pipeline = named[base[0]][1]
        codecs = codecs_metadata("fast" if name == INT8 else name, "float32")
        assert [codec["name"] for codec in codecs] == re.sub(r" \([^)]*\)", "", pipeline).split(", ")
        for codec in codecs:
            if codec["name"] == "blosc":
                settings = codec["configuration"]
                assert f"({settings['cname']}, {settings['shuffle']})" in pipeline
    rounded = [codec for codec in PRESETS.values() if isinstance(codec, BitRound)]
    assert [codec.name for codec in rounded] == [f"bitround{codec.kept_bits}" for codec in rounded]
    assert len(rounded) == 3


def test_the_arrays_of_int8_block32(tmp_path: Path) -> None:
    codes_, scales, *_ = PLAN.arrays
    assert (codes_.path, codes_.dtype, codes_.row_shape) == ("sites/resid_post/7", "int8", (40,))
    assert (scales.path, scales.dtype, scales.row_shape) == ("scales/resid_post/7", "float32", (2,))
    root = make_archive(tmp_path / "a.zarr", INT8)
    _, _, attributes = open_array(root, "sites/resid_post/0")
    quantised = attributes["quantised"]
    assert isinstance(quantised, dict)
    assert set(re.findall(r"`(quantised\.\w+)`", PAGE)) == {f"quantised.{key}" for key in quantised}
    assert "`relative_rms_error`" in PAGE
    assert "relative_rms_error" in attributes


def test_the_row_columns() -> None:
    listed = re.findall(r"^  rows/(\w+) +(\w+), \[rows\]", blocks("store/FORMAT.md", language="")[0], re.MULTILINE)
    assert dict(listed) == ROW_COLUMNS
    assert {codes(row[0])[0]: row[1] for row in TABLES["column of the rows"]} == IMAGE_COLUMNS
    assert f"`{', '.join(MODALITIES)}`" in PAGE


def test_the_data_types() -> None:
    text = sentence("Data types are ")
    assert text.endswith("little endian")
    assert codes(text) == list(STORAGE_DTYPES)


def test_the_columns_of_the_example_table() -> None:
    text = sentence("Columns: ")
    listed = dict(re.findall(r"`(\w+)` (list of int32|int\d\d)", text))
    types = {name: str(kind).replace("list<item: int32>", "list of int32") for name, kind in OWN_COLUMNS.items()}
    assert listed == types
    for name in SOURCE_COLUMNS:
        assert f"`{name}`" in PAGE


def test_the_index_of_a_shard() -> None:
    assert f"index at the {INDEX_LOCATION}, index codecs `bytes` (little endian) and `crc32c`" in PAGE
    assert [codec["name"] for codec in INDEX_CODECS] == ["bytes", "crc32c"]


def test_the_folders() -> None:
    first = blocks("store/FORMAT.md", language="")[0]
    top = {line.split("/")[0].strip() for line in first.splitlines()[1:] if "/" in line.split("  ")[1]}
    assert top == {"sites", "rows", "scales", FOLDER, *SIDECAR_FOLDERS}
    assert f"\n  {INDEX} " in first


def test_the_fidelity_file(tmp_path: Path) -> None:
    site = SiteFidelity(kl_mean=1e-6, kl_max=0.5, top1_agreement=0.75)
    found = Fidelity(sites={"resid_post.7": site}, n_examples=2, n_tokens=9)
    write_fidelity(tmp_path, PLAN, found)
    assert f"\n  {FIDELITY_FILE} " in blocks("store/FORMAT.md", language="")[0]
    content = json.loads((tmp_path / FIDELITY_FILE).read_text())
    entry = content["fidelity"]
    assert [codes(row[0]) for row in TABLES["key of a site's fidelity"]] == [[key] for key in asdict(site)]
    assert entry == {"plan": PLAN.digest, "n_examples": 2, "n_tokens": 9, "sites": {"resid_post.7": asdict(site)}}
    assert {"fidelity", "plan", "n_examples", "n_tokens", "sites"} <= set(codes(PAGE.split("## Fidelity")[1]))
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    assert content["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert read_fidelity(tmp_path, PLAN) == found


def test_the_side_tables(tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "acts.zarr"))
    table = archive.annotate({"example": [0], "x": [1]}, name="judge")
    content = json.loads((archive.path / SIDE_TABLES).read_text())
    entry = content["annotations"]
    assert (
        content["sha256"]
        == hashlib.sha256(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    assert [codes(row[0]) for row in TABLES["key of a side table"]] == [[key] for key in entry["tables"][0]]
    digest = hashlib.sha256((archive.path / table.paths()[0]).read_bytes()).hexdigest()
    assert table.paths() == [f"annotations/judge-{digest[:16]}-00000.parquet"]
    assert entry["tables"][0]["files"] == [digest]
    kinds = codes(next(row[1] for row in TABLES["key of a side table"] if row[0] == "`columns`"))
    assert {kind for kind in KINDS if not kind.startswith("list of")} == set(kinds) - {"list of"}
