"""Object stores for tests, which run as programs on loopback, can be filled, and report what they served.

Each is a `Store`, which creates buckets, writes objects without the puller, and returns the storage settings by which
the puller reaches it. The servers of `programs` must have been built. moto is one of the development packages.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import obstore
from obstore.store import AzureStore, S3Store

from mesh import process
from tests.support import programs

_START = 60.0  # seconds; Node on a busy machine takes 10
_PUTS = 16  # at a time


class Store(Protocol):
    """An object store with one kind of API."""

    port: int
    scheme: str  # the scheme of the URIs of the store's objects
    checks_credentials: bool

    def settings(self, bucket: str, *, port: int = 0, secret: str = "") -> dict[str, str]:
        """Returns storage settings, as in a storage secret, for the store's own port or a proxy's. `secret` overrides
        the store's secret with a wrong one."""

    def uri(self, bucket: str, path: str) -> str: ...

    async def make(self, bucket: str) -> None: ...

    async def put(self, bucket: str, objects: Mapping[str, bytes]) -> None: ...

    async def mark(self, bucket: str, key: str) -> None:
        """Writes a folder marker: an object of no bytes with "/" at the end of its key."""

    async def put_odd(self, bucket: str, key: str) -> None:
        """Writes an object of one byte whose key may not be a valid path."""


class _Program:
    """A server program that ends with the test process."""

    def __init__(self, argv: Callable[[int], Sequence[str]], log: Path, **environment: str) -> None:
        self.port = process.free_port()
        self._log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                process.tethered(list(argv(self.port))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        end = time.monotonic() + _START
        while not self._listens():
            if self._child.poll() is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"{argv(self.port)[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)

    def _listens(self) -> bool:
        import socket

        with contextlib.closing(socket.socket()) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Ends the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait(10)


async def _put_all(client: Any, objects: Mapping[str, bytes]) -> None:
    slots = asyncio.Semaphore(_PUTS)

    async def put(key: str, body: bytes) -> None:
        async with slots:
            await obstore.put_async(client, key, body, use_multipart=False)

    async with asyncio.TaskGroup() as group:
        for key, body in objects.items():
            group.create_task(put(key, body))


class _S3:
    scheme = "s3"
    checks_credentials = False
    access, secret = "AKIDMESHTEST", "s3-secret-of-this-test"

    def __init__(self, program: _Program) -> None:
        self._program = program
        self.port = program.port

    def settings(self, bucket: str, *, port: int = 0, secret: str = "") -> dict[str, str]:
        return {
            "type": "s3",
            "access_key_id": self.access,
            "secret_access_key": secret or self.secret,
            "endpoint_url": f"http://127.0.0.1:{port or self.port}",
            "region": "us-east-1",
            "bucket": bucket,
        }

    def uri(self, bucket: str, path: str) -> str:
        return f"s3://{bucket}/{path}"

    def client(self, bucket: str) -> S3Store:
        """Returns a client that writes without the puller."""
        return S3Store(
            bucket,
            config={"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1"},
            access_key_id=self.access,
            secret_access_key=self.secret,
            client_options={"allow_http": True, "timeout": "10m"},
        )

    async def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        await _put_all(self.client(bucket), objects)

    async def put_odd(self, bucket: str, key: str) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
        )
        await asyncio.to_thread(client.put_object, Bucket=bucket, Key=key, Body=b"x")

    def log(self) -> str:
        """Returns the store's access log."""
        return self._program.log()

    def stop(self) -> None:
        self._program.stop()


class Moto(_S3):
    """The S3 server of moto, which accepts wrong secrets."""

    def __init__(self, folder: Path) -> None:
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
        super().__init__(_Program(lambda port: [*argv, str(port)], folder / "moto.log"))

    async def make(self, bucket: str) -> None:
        await asyncio.to_thread(_request, "PUT", f"http://127.0.0.1:{self.port}/{bucket}")

    async def mark(self, bucket: str, key: str) -> None:
        await asyncio.to_thread(_request, "PUT", f"http://127.0.0.1:{self.port}/{bucket}/{key}")


class Versity(_S3):
    """The fast S3 server versitygw over a folder, which checks signatures."""

    checks_credentials = True

    def __init__(self, folder: Path, *, extra: Sequence[str] = ()) -> None:
        self._folder = folder / "buckets"
        self._folder.mkdir()
        path = str(programs.VERSITYGW.path)
        program = _Program(
            lambda port: [path, *extra, "--port", f"127.0.0.1:{port}", "posix", str(self._folder)],
            folder / "versitygw.log",
            ROOT_ACCESS_KEY=self.access,
            ROOT_SECRET_KEY=self.secret,
        )
        super().__init__(program)

    async def make(self, bucket: str) -> None:
        (self._folder / bucket).mkdir()

    async def mark(self, bucket: str, key: str) -> None:
        (self._folder / bucket / key).mkdir(parents=True, exist_ok=True)


class FakeGcs:
    """The GCS server fake-gcs-server, which ignores credentials."""

    scheme = "gs"
    checks_credentials = False

    def __init__(self, folder: Path) -> None:
        argv = [str(programs.FAKE_GCS.path), "-scheme", "http", "-host", "127.0.0.1", "-backend", "memory"]

        # Without its public host it answers no requests to buckets by path.
        def with_port(port: int) -> list[str]:
            return [*argv, "-port", str(port), "-public-host", f"127.0.0.1:{port}"]

        self._program = _Program(with_port, folder / "fake-gcs.log")
        self.port = self._program.port

    def settings(self, bucket: str, *, port: int = 0, secret: str = "") -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{port or self.port}"
        return {"type": "gcs", "bucket": bucket, "endpoint_url": endpoint, "identity": "anonymous"}

    def uri(self, bucket: str, path: str) -> str:
        return f"gs://{bucket}/{path}"

    async def make(self, bucket: str) -> None:
        url = f"http://127.0.0.1:{self.port}/storage/v1/b?project=test"
        await asyncio.to_thread(_request, "POST", url, b'{"name": "%s"}' % bucket.encode(), type="application/json")

    async def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        base = f"http://127.0.0.1:{self.port}/upload/storage/v1/b/{bucket}/o?uploadType=media&name="

        def put() -> None:
            for key, body in objects.items():
                _request("POST", base + quote(key, safe=""), body, type="application/octet-stream")

        await asyncio.to_thread(put)

    async def mark(self, bucket: str, key: str) -> None:
        await self.put(bucket, {key: b""})

    async def put_odd(self, bucket: str, key: str) -> None:
        await self.put(bucket, {key: b"x"})

    def log(self) -> str:
        return self._program.log()

    def stop(self) -> None:
        self._program.stop()


class Azurite:
    """The blob service of azurite, with the account and the key that its documentation publishes."""

    scheme = "azure"
    checks_credentials = True
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, folder: Path) -> None:
        node = programs.node()
        assert node is not None
        # The program itself, because the package's command would start it as a child process.
        argv = [node, str(programs.AZURITE.path), "--blobHost", "127.0.0.1", "--inMemoryPersistence"]
        argv += ["--skipApiVersionCheck", "--disableTelemetry"]
        self._program = _Program(lambda port: [*argv, "--blobPort", str(port)], folder / "azurite.log")
        self.port = self._program.port

    def settings(self, bucket: str, *, port: int = 0, secret: str = "") -> dict[str, str]:
        key = base64.b64encode(secret.encode()).decode() if secret else self.key
        endpoint = f"http://127.0.0.1:{port or self.port}/{self.account}"
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={key};BlobEndpoint={endpoint};"
        )
        return {"type": "azure", "account_name": self.account, "container": bucket, "connection_string": connection}

    def uri(self, bucket: str, path: str) -> str:
        return f"azure://{self.account}/{bucket}/{path}"

    async def make(self, bucket: str) -> None:
        await self._put(bucket, "restype=container", "\nrestype:container")

    async def _put(self, path: str, query: str = "", signed: str = "", body: bytes = b"", **headers: str) -> None:
        """Makes a signed request without obstore, which cannot create containers or write keys that are not paths."""
        date = formatdate(usegmt=True)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent |= {"x-ms-date": date, "x-ms-version": "2021-12-02"}
        lines = "".join(f"{name}:{value}\n" for name, value in sorted(sent.items()))
        length, kind = (str(len(body)), "application/octet-stream") if body else ("", "")
        text = f"PUT\n\n\n{length}\n\n{kind}\n\n\n\n\n\n\n{lines}/{self.account}/{self.account}/{path}{signed}"
        mac = hmac.new(base64.b64decode(self.key), text.encode(), hashlib.sha256).digest()
        sent["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(mac).decode()}"
        url = f"http://127.0.0.1:{self.port}/{self.account}/{path}" + (f"?{query}" if query else "")
        await asyncio.to_thread(_request, "PUT", url, body or None, type=kind, headers=sent)

    async def put_odd(self, bucket: str, key: str) -> None:
        await self._put(f"{bucket}/{quote(key)}", body=b"x", x_ms_blob_type="BlockBlob")

    async def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        client = AzureStore(
            bucket,
            config={"account_name": self.account, "endpoint": f"http://127.0.0.1:{self.port}/{self.account}"},
            account_key=self.key,
            client_options={"allow_http": True},
        )
        await _put_all(client, objects)

    async def mark(self, bucket: str, key: str) -> None:
        raise NotImplementedError("no folder markers in azurite: obstore cannot write their keys")

    def log(self) -> str:
        return self._program.log()

    def stop(self) -> None:
        self._program.stop()


def _request(
    method: str, url: str, body: bytes | None = None, *, type: str = "", headers: Mapping[str, str] | None = None
) -> None:
    sent = {**(headers or {}), **({"Content-Type": type} if type else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, sent, method=method), timeout=30) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {error.code} {error.read()[:500]!r}") from None
