"""A real S3 server on this machine (moto's), as a process of its own that a test may end and start again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "tests"
# what a user sets for a store of his own; botocore and s3fs read it
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "sesame-sesame", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """Holds what it is given until it is ended."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.address}

    def start(self) -> None:
        """Returns when it answers and has an empty bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                assert self._process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, "no S3 server in time"
                time.sleep(0.1)
        self.client().create_bucket(Bucket=BUCKET)

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.address,
            region_name=KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def names(self, prefix: str = "") -> set[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return {item["Key"] for item in found.get("Contents", [])}

    def content(self, name: str) -> bytes:
        return bytes(self.client().get_object(Bucket=BUCKET, Key=name)["Body"].read())

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def s3_server(log: Path) -> Iterator[Server]:
    server = Server(log)
    server.start()
    try:
        yield server
    finally:
        server.end()


@contextmanager
def using(environment: dict[str, str]) -> Iterator[None]:
    """These variables in this process; fsspec forgets the connections that it made with others."""
    from s3fs import S3FileSystem

    before = dict(os.environ)
    os.environ.update(environment)
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        S3FileSystem.clear_instance_cache()
