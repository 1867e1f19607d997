"""Archives sent to the Hub: whole after a kill, nothing sent twice, nothing mixed, and errors that say what to do."""

import json
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from residua.store.base.errors import DamagedArchiveError, PlanError, StorageError
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sharing.card import Licences, is_own
from residua.store.sharing.hub_client import HubSizes
from residua.store.sharing.push import push, push_to_hub
from residua.store.verification.verify import verify
from tests.servers.hub import HubServer, serving_hub
from tests.servers.hub_client import StandInXet, online, use_hub
from tests.store.small_archive import make_archive

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub's own requests
]
N_KILLS = 4


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serving_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    use_hub(monkeypatch, running)
    running.repositories.clear()
    running.faults.clear()
    running.uploaded, running.page = 0, 7
    for path in running.folder.iterdir():
        path.unlink()
    return running


def content(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith("commits/")}


def published(hub: HubServer, name: str = "datasets/org/acts", revision: str = "main") -> dict[str, bytes]:
    """Return what the repository has, without what it had from the beginning."""
    files = hub.repositories[name].files(revision)
    return {path: hub.content(file) for path, file in files.items() if path != ".gitattributes"}


def test_a_repository_is_made_and_holds_the_archive_and_its_card(hub: HubServer, tmp_path: Path) -> None:
    source, steps = make_archive(tmp_path / "a.zarr"), []
    sent = push(source, "hf://datasets/org/acts", on_bytes=lambda *step: steps.append(step))
    there = published(hub)
    card = {name: there.pop(name) for name in ("README.md", "croissant.json")}
    assert there == content(source)
    size = sum(map(len, [*there.values(), *card.values()]))
    assert (sent.n_files, sent.n_bytes, sent.sent_bytes, sent.notes) == (len(there) + 2, size, size, ())
    assert (steps[-1], steps) == ((size, size), sorted(steps))
    assert hub.repositories["datasets/org/acts"].private
    assert is_own(card["README.md"].decode())
    opened = RemoteArchive("hf://datasets/org/acts", cache=False)
    assert np.array_equal(opened["q.1"][:], Archive(source)["q.1"][:])
    assert verify("hf://datasets/org/acts").problems == []


def test_what_is_there_is_not_sent_again(hub: HubServer, tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    push(source, "hf://datasets/org/acts/b/acts.zarr", public=True)
    assert not hub.repositories["datasets/org/acts"].private
    n_commits, uploaded = len(hub.repositories["datasets/org/acts"].commits), hub.uploaded
    again = push(source, "hf://datasets/org/acts/b/acts.zarr")
    assert (again.sent_bytes, hub.uploaded) == (0, uploaded)
    assert len(hub.repositories["datasets/org/acts"].commits) == n_commits
    push(source, "hf://datasets/org/acts@try%2F2/b/acts.zarr")
    assert {name.partition("/")[0] for name in published(hub, revision="try/2")} == {"b", "README.md"}
    assert RemoteArchive("hf://datasets/org/acts@try%2F2/b/acts.zarr", cache=False).sites == Archive(source).sites
    assert hub.uploaded == uploaded


def test_a_site_that_was_added_goes_alone(hub: HubServer, tmp_path: Path) -> None:
    whole = make_archive(tmp_path / "a.zarr")
    part = make_archive(tmp_path / "part.zarr", sites=("resid_post.0",))
    push(part, "hf://datasets/org/acts")
    old = RemoteArchive("hf://datasets/org/acts", cache=False)
    uploaded = hub.uploaded
    sent = push(whole, "hf://datasets/org/acts")
    shards = sum(len(data) for name, data in content(whole).items() if name.startswith("sites/q/1/c"))
    assert shards < hub.uploaded - uploaded <= sent.sent_bytes < sum(map(len, content(whole).values()))
    assert {name: data for name, data in published(hub).items() if name in content(whole)} == content(whole)
    assert np.array_equal(old["resid_post.0"][:], Archive(whole)["resid_post.0"][:]), "still as it was opened"
    with pytest.raises(PlanError, match="holds another archive"):
        push(part, "hf://datasets/org/acts")


def test_archives_are_not_mixed(hub: HubServer, tmp_path: Path) -> None:
    one, other = make_archive(tmp_path / "a.zarr"), make_archive(tmp_path / "b.zarr", seed=1)
    push(one, "hf://datasets/org/acts")
    with pytest.raises(PlanError, match=r"org/acts holds another archive"):
        push(other, "hf://datasets/org/acts")
    hub.publish("org/begun", one, private=True)
    files = dict(hub.repositories["datasets/org/begun"].files())
    del files["zarr.json"]
    hub.repositories["datasets/org/begun"].commit(files)
    part = make_archive(tmp_path / "part.zarr", seed=1, sites=("resid_post.0",))
    with pytest.raises(PlanError, match=r"sites/q/1"):
        push(part, "hf://datasets/org/begun")
    push(other, "hf://datasets/org/acts/beside")
    assert np.array_equal(RemoteArchive("hf://datasets/org/acts/beside")["q.1"][:], Archive(other)["q.1"][:])


@pytest.mark.parametrize(
    "faults",
    [
        {"api": [503, "429:1", "lost"], "upload": [500, 503, "lost", "cut"]},
        {"commit": [500, "lost", 503, 412]},
    ],
    ids=str,
)
def test_what_passes_is_tried_again(faults: dict[str, list[int | str]], hub: HubServer, tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    hub.faults.update({kind: list(these) for kind, these in faults.items()})
    push(source, "hf://datasets/org/acts")
    assert not any(hub.faults.values())
    assert content(source).items() <= published(hub).items()


def test_what_does_not_pass_says_what_to_do(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_archive(tmp_path / "a.zarr")
    with pytest.raises(StorageError, match=r"create hf://datasets/else/acts.*403.*hf auth login.*else"):
        push(source, "hf://datasets/else/acts")
    with pytest.raises(StorageError, match="commit"):
        push(source, f"hf://datasets/org/acts@{'0' * 40}")
    hub.faults["commit"] = [400]
    with pytest.raises(StorageError, match=r"org/acts.*400.*same command again"):
        push(source, "hf://datasets/org/acts")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StorageError, match="hf auth login"):
        push(source, "hf://datasets/org/acts")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    path = source / "sites" / "q" / "1" / "c" / "1" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArchiveError, match="sites/q/1/c/1"):
        push(source, "hf://datasets/org/acts")
    assert "zarr.json" not in published(hub)


def test_a_file_that_changed_there_is_noticed_and_sent_again(hub: HubServer, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), "hf://datasets/org/acts"
    push(source, address)
    repository = hub.repositories["datasets/org/acts"]
    name = "sites/q/1/c/1/0/0"
    data = content(source)[name]
    repository.commit({**repository.files(), name: hub.add(bytes(len(data)))})
    assert verify(address).problems
    assert push(source, address).sent_bytes == len(data)
    assert content(source).items() <= published(hub).items()


def push_in(source: Path, sizes: HubSizes, options: dict[str, str] | None = None) -> None:
    push_to_hub(Archive(source), "hf://datasets/org/acts", Licences(), options, lambda *_: None, sizes=sizes)


def test_more_files_than_the_hub_takes(hub: HubServer, tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    for sizes in (HubSizes(most_files=2), HubSizes(most_in_a_folder=2)):
        with pytest.raises(PlanError, match=r"the Hub takes .*\b2\b.*residua pack .*--for hub"):
            push_in(source, sizes)
    assert not hub.repositories


def test_a_card_that_somebody_edited_stays(hub: HubServer, tmp_path: Path) -> None:
    source, address = make_archive(tmp_path / "a.zarr"), "hf://datasets/org/acts"
    push(source, address)
    push(source, address, license="cc-by-4.0")
    card = published(hub)["README.md"].decode()
    assert "license: cc-by-4.0" in card
    repository = hub.repositories["datasets/org/acts"]
    edited = card.replace("# Activations", "# My activations").encode()
    repository.commit({**repository.files(), "README.md": hub.add(edited)})
    found = push(source, address, license="mit")
    assert ("README.md" in found.notes[0], published(hub)["README.md"]) == (True, edited)
    (source / "README.md").write_bytes(b"my own")
    assert published(hub)["README.md"] == edited
    push(source, "hf://datasets/org/mine")
    assert published(hub, "datasets/org/mine")["README.md"] == b"my own"
    other = make_archive(tmp_path / "b.zarr", seed=1)
    found = push(other, "hf://datasets/org/acts/second.zarr")
    assert (len(found.notes), published(hub)["README.md"]) == (1, edited)


def test_a_bucket(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of buckets speaks Xet alone, so here a stand-in takes the bytes."""
    monkeypatch.setattr("huggingface_hub.utils._xet.get_xet_session", lambda: StandInXet(hub))
    source, address = make_archive(tmp_path / "a.zarr"), "hf://buckets/org/acts/a.zarr"
    sent = push(source, address)
    there = {name.removeprefix("a.zarr/"): data for name, data in published(hub, "buckets/org/acts").items()}
    assert (there, sent.sent_bytes) == (content(source), sum(map(len, there.values())))
    assert np.array_equal(RemoteArchive(address, cache=False)["q.1"][:], Archive(source)["q.1"][:])
    shards = sum(len(data) for name, data in there.items() if "/c/" in name)
    assert push(source, address).sent_bytes == sent.sent_bytes - shards
    with pytest.raises(PlanError, match="another archive"):
        push(make_archive(tmp_path / "b.zarr", seed=1), address)


def _push(source: Path, options: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        online(patch)
        push_in(source, HubSizes(commit_files=5, group_files=2), options)


def test_killed_at_random_moments_it_goes_on(hub: HubServer, tmp_path: Path) -> None:
    """Killed while some request, by its number, is under way or was just answered."""
    source, moments = make_archive(tmp_path / "a.zarr"), random.Random(5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "huggingface_hub.hf_api"])
    for number in sorted(moments.sample(range(2, 60), N_KILLS)):
        hub.requests.clear()
        process = context.Process(target=_push, args=(source, hub.options))
        process.start()
        while hub.requests.total() < number and process.is_alive():
            process.join(0.001)
        process.kill()
        process.join()
        if hub.repositories and "zarr.json" in published(hub):
            assert verify("hf://datasets/org/acts").problems == [], "complete, or not there"
    _push(source, hub.options)
    there = published(hub)
    assert json.loads(there.pop("croissant.json"))["@type"] == "sc:Dataset"
    assert there.pop("README.md")
    assert there == content(source), "and nothing else is left"
    assert verify("hf://datasets/org/acts").problems == []
