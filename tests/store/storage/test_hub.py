"""Files of the Hub: each is asked for once, in one commit, within the Hub's limits; what goes wrong is said."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from residua.store.base.errors import StorageError
from residua.store.storage.hub import HubFolder, folder_at
from residua.store.storage.objects import ObjectFolder
from residua.store.storage.web import Answer
from tests.servers.hub import HubServer, serving_hub

pytestmark = pytest.mark.timeout(120)
LARGE = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serving_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: HubServer, tmp_path: Path) -> HubServer:
    source = tmp_path / "source" / "a.zarr"
    source.mkdir(parents=True)
    (source / "large").write_bytes(LARGE)
    (source / "small").write_text("text")
    running.publish("org/acts", tmp_path / "source")
    running.requests.clear()
    running.faults.clear()
    running.signed_seconds = 3600
    return running


def opened(
    hub: HubServer, address: str = "hf://datasets/org/acts/a.zarr", token: str = "", **options: int
) -> HubFolder:
    return HubFolder(address, {"endpoint": hub.url, "token": token or "none"}, **options)


def test_a_file_is_asked_for_once(hub: HubServer) -> None:
    folder = opened(hub)
    for start in range(0, 5000, 500):
        assert folder.read_range("large", start, start + 9).tobytes() == LARGE[start : start + 9]
    far = len(LARGE) - 3
    assert folder.read_range("large", far, far + 3).tobytes() == LARGE[far:]
    assert (folder.read("large", len(LARGE)), folder.read("small", 4)) == (LARGE, b"text")
    assert (folder.size("large"), folder.size("small"), folder.size("gone")) == (len(LARGE), 4, None)
    assert hub.requests["resolve"] == 4, "large once, small twice, gone once"


def test_many_threads_ask_for_it_once(hub: HubServer) -> None:
    folder = opened(hub)
    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda start: folder.read_range("large", start, start + 5).tobytes(), range(60)))
    assert parts == [LARGE[start : start + 5] for start in range(60)]
    assert hub.requests["resolve"] == 1


def test_an_open_folder_stays_at_its_commit(hub: HubServer) -> None:
    folder, repository = opened(hub), hub.repositories["datasets/org/acts"]
    before = folder.commit
    folder.read("small", 4)
    assert before is None
    first = repository.branches["main"]
    assert (folder.commit, folder.address) == (first, f"hf://datasets/org/acts@{first}/a.zarr")
    repository.commit({"a.zarr/small": hub.add(b"changed")})
    assert folder.read("small", 4) == b"text"
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301
    assert (again.read("small", 4), again.size("large")) == (b"text", len(LARGE))
    assert opened(hub).read("small", 7) == b"changed"
    assert opened(hub, f"hf://datasets/org/acts@{first}/a.zarr").read("small", 4) == b"text"


def test_a_signed_address_whose_time_is_over_is_replaced(hub: HubServer) -> None:
    folder = opened(hub)
    for start in range(0, 500, 100):
        folder.read_range("large", start, start + 9)
        folder._signed["large"] = folder._signed["large"].replace("Expires=", "Expires=0")
    assert hub.requests["resolve"] == 5


@pytest.mark.parametrize("kind", ["resolve", "storage"])
def test_what_passes_is_asked_for_again(kind: str, hub: HubServer) -> None:
    hub.faults[kind] = [503, "429:0", 500, "cut"] if kind == "storage" else [503, "429;1", 500]
    assert opened(hub).read("large", len(LARGE)) == LARGE
    assert not hub.faults[kind]


def test_what_does_not_pass_is_said(hub: HubServer) -> None:
    hub.faults["resolve"] = [500] * 9
    with pytest.raises(StorageError, match=r"a\.zarr/large.*500"):
        opened(hub, tries=1).read("large", len(LARGE))
    hub.faults["resolve"] = ["429:400"]
    with pytest.raises(StorageError, match=r"429.*too many requests"):
        opened(hub, tries=1).read("large", len(LARGE))
    hub.faults.clear()
    hub.faults["resolve"] = ["elsewhere"] * 9
    with pytest.raises(StorageError, match=r"a\.zarr/large"):
        opened(hub, tries=1).read("large", len(LARGE))


@pytest.mark.parametrize("target", ["http://cdn.example/x", "file:///etc/passwd", "https://me:secret@cdn.example/x"])
def test_an_answer_that_sends_somewhere_unsafe(target: str) -> None:
    folder = HubFolder("hf://datasets/org/acts")
    answer = Answer(302, {"location": target}, b"", 0)
    with pytest.raises(StorageError, match=r"org/acts/large.*hub\.example.*not safe") as refused:
        folder._moved("large", "https://hub.example/large", answer)
    assert "secret" not in str(refused.value)


def test_the_login_goes_to_the_hub_alone(hub: HubServer) -> None:
    """The storage refuses requests that bring one."""
    hub.repositories["datasets/org/acts"].private = True
    assert opened(hub, token=hub.token).read("large", len(LARGE)) == LARGE
    with pytest.raises(StorageError, match=r"org/acts.*hf auth login"):
        opened(hub, token="hf_wrong").read("large", len(LARGE))  # noqa: S106


def test_what_is_not_there_or_not_allowed(hub: HubServer) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.zarr/gone"):
        opened(hub).read("gone", 9)
    with pytest.raises(StorageError, match=r"org/nothing.*check the name"):
        opened(hub, "hf://datasets/org/nothing").read("small", 9)
    with pytest.raises(StorageError, match="revision v9"):
        opened(hub, "hf://datasets/org/acts@v9").read("small", 9)
    with pytest.raises(StorageError, match=r"large has 10,240 bytes.* 9 "):
        opened(hub).read("large", 9)
    with pytest.raises(StorageError, match="shorter"):
        opened(hub).read_range("large", 20_000, 20_009)
    hub.repositories["datasets/org/acts"].gated = True
    with pytest.raises(StorageError, match=r"GatedRepo.*/datasets/org/acts.*ask for access"):
        opened(hub).read("small", 9)
    with pytest.raises(StorageError, match="residua push"):
        opened(hub).write("small", [b"x"])
    with pytest.raises(StorageError, match="access_key_id"):
        folder_at("hf://datasets/org/acts", {"access_key_id": "x"})


def test_buckets_have_no_revision(hub: HubServer) -> None:
    source = hub.repositories["datasets/org/acts"]
    hub.repositories["buckets/org/acts"] = source
    folder = opened(hub, "hf://buckets/org/acts/a.zarr")
    assert (folder.read("large", len(LARGE)), folder.commit) == (LARGE, None)
    with pytest.raises(StorageError, match="hf://buckets/ORG/NAME"):
        folder_at("hf://buckets/org/acts@main")


def test_other_addresses_go_to_obstore() -> None:
    assert type(folder_at("https://example.org/a.zarr")) is ObjectFolder
