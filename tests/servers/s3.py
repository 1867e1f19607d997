"""SeaweedFS, a real S3 server, on loopback."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.servers.processes import SECONDS, await_answer, free_ports


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket.

    Attributes:
        options: `storage_options` for it.
        bucket: Name of the bucket.
    """

    options: Mapping[str, Any]
    bucket: str = "acts"

    @property
    def environment(self) -> dict[str, str]:
        """What the tools of S3 take from the environment to find it."""
        return {
            "AWS_ENDPOINT_URL": self.options["endpoint"],
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": self.options["region"],
            "AWS_SKIP_SIGNATURE": "true",
        }

    def address(self, name: str) -> str:
        """Return the address of a folder in the bucket."""
        return f"s3://{self.bucket}/{name}"


@contextmanager
def serving_s3(folder: Path, *, n_volumes: int = 8) -> Iterator[S3Server]:
    """Run a server that keeps its data in `folder`, at most `n_volumes` of 64 MiB, while the context lasts."""
    parts = ("master", "volume", "filer", "s3")
    names = [f"{part}.port{kind}" for part in parts for kind in ("", ".grpc")] + ["s3.port.iceberg", "s3.port.lance"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    words = [str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder}", "-s3", "-master.telemetry=false"]
    words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64", f"-volume.max={n_volumes}"]
    words += [f"-{name}={port}" for name, port in ports.items()]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            await_answer(process, lambda: _make_ready(endpoint), "the S3 server, whose log is in its folder,")
            options = {
                "endpoint": endpoint,
                "region": "us-east-1",
                "skip_signature": True,
                "virtual_hosted_style_request": False,
            }
            yield S3Server(options)
        finally:
            process.kill()  # asked politely, it takes twenty seconds
            process.wait(timeout=SECONDS)


def _make_ready(endpoint: str) -> None:
    """Make the bucket, and an object in it: some seconds after the server listens it takes both."""
    for place in ("/acts", "/acts/ready"):
        urlopen(Request(endpoint + place, data=b"", method="PUT"), timeout=10).close()  # noqa: S310
