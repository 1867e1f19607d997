"""Addresses: where files are, in a folder of this machine, in a bucket, on a web server, or on the Hugging Face Hub.

acts.zarr                                    a folder
s3://BUCKET/acts.zarr                        Amazon S3 and what speaks its protocol (`endpoint` in storage_options)
gs://BUCKET/acts.zarr                        Google Cloud Storage
az://CONTAINER/acts.zarr                     Azure Blob Storage (`account_name` in storage_options)
https://example.org/acts.zarr                any web server that answers requests for ranges of bytes
hf://datasets/ORG/NAME[@REVISION][/acts.zarr]    a dataset repository of the Hub
hf://buckets/ORG/NAME[/acts.zarr]            a bucket of the Hub
"""

import re
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from residua.store.base.errors import StorageError

SCHEMES = ("s3", "gs", "az", "http", "https", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_HUB = re.compile(
    r"(?P<kind>datasets|buckets)/(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<folder>.+))?"
)


@dataclass(frozen=True)
class HubPlace:
    """A folder in a dataset repository or a bucket of the Hub.

    Attributes:
        repository: ``ORG/NAME``.
        revision: A branch, a tag or a commit; empty in a bucket.
        folder: Path inside the repository; empty for its root.
        kind: ``datasets`` or ``buckets``.
    """

    repository: str
    revision: str
    folder: str
    kind: str = "datasets"

    @property
    def page(self) -> str:
        """Path of its page on the Hub."""
        return f"/{self.kind}/{self.repository}"

    @property
    def files(self) -> str:
        """Path on the Hub below which its files are asked for."""
        revision = f"/{quote(unquote(self.revision), safe='')}" if self.revision else ""
        folder = f"/{quote(self.folder)}" if self.folder else ""
        return f"{self.page}/resolve{revision}{folder}"

    @property
    def address(self) -> str:
        """The address of the folder."""
        revision = f"@{self.revision}" if self.revision not in ("", "main") else ""
        return f"hf://{self.kind}/{self.repository}{revision}" + (f"/{self.folder}" if self.folder else "")

    def at(self, revision: str) -> "HubPlace":
        """Return the same folder in another revision."""
        return replace(self, revision=revision)


def scheme_of(place: str | PathLike[str]) -> str:
    """Return the scheme of an address, ``s3`` for example; empty for a path of this machine."""
    found = _SCHEME.match(str(fspath(place)))
    return found[1].lower() if found else ""


def is_remote(place: str | PathLike[str]) -> bool:
    """Return whether `place` is an address, and not a path of this machine."""
    return bool(scheme_of(place))


def check_address(address: str) -> None:
    """Raise StorageError unless Residua can read from `address`."""
    scheme, parts = scheme_of(address), urlsplit(address)
    if scheme not in SCHEMES:
        raise StorageError(
            f"{shown(address)} has the scheme {scheme}:, which is not known: use a path, or an address that begins "
            f"with {', '.join(f'{known}://' for known in SCHEMES)}"
        )
    if not parts.netloc:
        raise StorageError(f"{shown(address)} names no bucket or host: write {scheme}://NAME/FOLDER")
    if parts.username or parts.password:
        raise StorageError(
            f"{shown(address)} holds a password: leave it out, for addresses are kept in results, and give it in "
            "storage_options or in the environment"
        )
    if ".." in PurePosixPath(parts.path).parts:
        raise StorageError(f"{shown(address)} has '..' in its path: write the folder itself")


def hub_place(address: str) -> HubPlace:
    """Return what an ``hf://`` address names.

    Raises:
        StorageError: It names neither a dataset repository nor a bucket.
    """
    found = _HUB.fullmatch(address.partition("://")[2].strip("/"))
    if found is None or (found["kind"] == "buckets" and found["revision"]):
        raise StorageError(
            f"{shown(address)} names no dataset repository and no bucket: write hf://datasets/ORG/NAME, with @REVISION "
            "and /FOLDER if needed, or hf://buckets/ORG/NAME"
        )
    revision = "" if found["kind"] == "buckets" else found["revision"] or "main"
    return HubPlace(found["repository"], revision, found["folder"] or "", found["kind"])


def shown(address: str | PathLike[str]) -> str:
    """Return an address for messages: without a password and without a signature in its query."""
    text = str(fspath(address))
    return re.sub(r"(?<=://)[^/@\s]*@(?=[^/])", "", re.sub(r"\?\S*", "", text)) if is_remote(text) else text


def joined(place: str | Path, name: str) -> str:
    """Return the place of `name` inside a folder or an address, for messages."""
    return (
        f"{shown(place).rstrip('/')}/{name}" if isinstance(place, str) and is_remote(place) else str(Path(place, name))
    )
