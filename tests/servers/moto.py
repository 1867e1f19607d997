"""moto, an S3 server that knows users and what each may do, on loopback: for what S3 refuses."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import boto3

from tests.servers.processes import SECONDS, await_answer, free_ports
from tests.servers.s3 import S3Server

RIGHTS = {"writer": ["s3:*"], "reader": ["s3:GetObject", "s3:ListBucket"], "nobody": ["s3:DeleteBucket"]}


@contextmanager
def serving_moto() -> Iterator[Mapping[str, S3Server]]:
    """Run moto with one bucket while the context lasts; give what each user of `RIGHTS` has of it."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            await_answer(process, lambda: _post(f"{endpoint}/moto-api/reset", b""), "moto")
            users = {name: _user(endpoint, name, actions) for name, actions in RIGHTS.items()}
            _client(endpoint, "s3").create_bucket(Bucket=S3Server.bucket)
            _post(f"{endpoint}/moto-api/reset-auth", b"0")  # from here on, each request needs its user's rights
            yield users
        finally:
            process.kill()
            process.wait(timeout=SECONDS)


def _user(endpoint: str, name: str, actions: list[str]) -> S3Server:
    iam = _client(endpoint, "iam")
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": actions, "Resource": "*"}}
    iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return S3Server(
        {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": key["AccessKeyId"],
            "secret_access_key": key["SecretAccessKey"],
            "virtual_hosted_style_request": False,
        }
    )


def _client(endpoint: str, service: str) -> Any:
    login = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    return boto3.client(service, endpoint_url=endpoint, **login)


def _post(url: str, data: bytes) -> None:
    headers = {"Content-Type": "text/plain"}  # else it is taken for a form
    urlopen(Request(url, data=data, headers=headers, method="POST"), timeout=10).close()  # noqa: S310
