"""The certificates, or the admin's key, in a Kubernetes Secret, accessed with the ServiceAccount of this pod.

The Secret must exist. A write sends the resourceVersion that was read, so that Kubernetes refuses the write if the
Secret has changed meanwhile. Temporary faults (no answer, an API server that is overloaded or being replaced) are
retried for `timeout` seconds.
"""

import asyncio
import base64
import binascii
import json
import os
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from mesh.certificates.keeping import StoreError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_REQUEST = 10.0  # seconds for one answer
_PAUSES = (0.25, 4.0)  # seconds between attempts, the first and the longest
_OK = 200
_PASSES = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The address of the Kubernetes API, and the credentials for it. The token is read for each request, because
    Kubernetes replaces it from time to time."""

    url: str  # https://HOST:PORT
    account: Path  # folder with token, ca.crt and namespace

    @classmethod
    def of_pod(cls, url: str = "", account: Path = ACCOUNT) -> "Cluster":
        """Returns the address and the credentials that Kubernetes gives to each pod. `url` and `account` replace
        Kubernetes's values. Raises StoreError outside a cluster, unless `url` is given."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not url and not host:
            raise StoreError(
                "without --kube-api, only a pod can write a Secret (--secret), and this is not a pod of a Kubernetes "
                "cluster (KUBERNETES_SERVICE_HOST is not set)"
            )
        return cls(url.rstrip("/") or f"https://{f'[{host}]' if ':' in host else host}:{port}", account)

    def read(self, name: str) -> str:
        """Reads a file of the ServiceAccount. Raises StoreError."""
        try:
            return (self.account / name).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise StoreError(
                f"{self.account / name} cannot be read: {why}. The pod needs the token of a ServiceAccount "
                "(automountServiceAccountToken: true)"
            ) from error

    def trust(self) -> "ssl.SSLContext | bool":
        """Returns what aiohttp takes as `ssl`: a context that trusts the cluster's authority, or True if the
        URL is not https. Raises StoreError if the authority cannot be read."""
        if not self.url.startswith("https:"):
            return True
        text = self.read("ca.crt")
        try:
            return ssl.create_default_context(cadata=text)
        except ssl.SSLError as error:
            raise StoreError(f"{self.account / 'ca.crt'} contains no valid certificate in PEM: {error}") from error


class Secret:
    """A store in a Secret. Without `namespace`, the Secret is in the pod's own. `timeout` is the time for all attempts
    of one request, in seconds."""

    def __init__(self, cluster: Cluster, name: str, *, namespace: str = "", timeout: float = 60.0) -> None:
        self._cluster = cluster
        self.name = name
        self._namespace = namespace
        self._timeout = timeout

    async def read(self) -> tuple[Mapping[str, bytes], object]:
        """Returns the Secret's entries and, as their version, the Secret itself."""
        found = await self._ask("GET", None)
        assert found is not None, "only a PUT can be in conflict"
        try:
            data = found.get("data") or {}
            return {key: base64.b64decode(value or "", validate=True) for key, value in data.items()}, found
        except (AttributeError, TypeError, binascii.Error) as error:
            raise StoreError(
                f"{self._cluster.url} gave an answer that is not the Secret {self.name}: check --kube-api"
            ) from error

    async def write(self, content: Mapping[str, bytes], version: object) -> bool:
        """Replaces the Secret's entries. Returns False if the Secret has changed since it was read."""
        assert isinstance(version, dict)
        data = {key: base64.b64encode(value).decode() for key, value in content.items()}
        return await self._ask("PUT", {**version, "data": data}) is not None

    def close(self) -> None:
        """Does nothing, because no connection stays open between requests."""

    async def _ask(self, method: str, body: Any) -> dict[str, Any] | None:
        """Sends a request and returns the answer, or None after a conflict. Raises StoreError."""
        trust = self._cluster.trust()
        namespace = self._namespace or self._cluster.read("namespace")
        url = f"{self._cluster.url}/api/v1/namespaces/{quote(namespace, safe='')}/secrets/{quote(self.name, safe='')}"
        pause, why = _PAUSES[0], "no answer"
        # The environment's proxies are ignored: the API is inside the cluster.
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_REQUEST), connector=aiohttp.TCPConnector(ssl=trust)
        ) as session:
            try:
                async with asyncio.timeout(self._timeout):
                    while True:
                        headers = {"authorization": f"Bearer {self._cluster.read('token')}"}
                        try:
                            async with session.request(method, url, json=body, headers=headers) as answer:
                                status, text = answer.status, await answer.read()
                        except aiohttp.ClientSSLError as error:
                            raise StoreError(
                                f"the Kubernetes API at {self._cluster.url} cannot be trusted: {error}. Check "
                                "--kube-api and --kube-account"
                            ) from error
                        except (aiohttp.ClientError, TimeoutError, OSError) as error:
                            why = str(error) or f"no answer within {_REQUEST:g} s"
                        else:
                            if status == HTTPStatus.CONFLICT:
                                return None
                            if status not in _PASSES and status < HTTPStatus.INTERNAL_SERVER_ERROR:
                                return self._judge(status, text, namespace)
                            why = f"it answers {status}"
                        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                        pause = min(pause * 2, _PAUSES[1])
            except TimeoutError as error:
                raise StoreError(
                    f"the Kubernetes API at {self._cluster.url} has given no usable answer for {self._timeout:g} "
                    f"s: {why}"
                ) from error

    def _judge(self, status: int, text: bytes, namespace: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if status == _OK and isinstance(found, dict):
            return found
        said = found.get("message", "") if isinstance(found, dict) else text[:200].decode(errors="replace")
        where = f"the Secret {self.name} in namespace {namespace}"
        match status:
            case HTTPStatus.NOT_FOUND:
                why = (
                    f"there is no {where.removeprefix('the ')}. Create it, because the right to create Secrets "
                    f"cannot be limited to one name: kubectl create secret generic {self.name} -n {namespace}"
                )
            case HTTPStatus.UNAUTHORIZED:
                why = (
                    f"the Kubernetes API at {self._cluster.url} does not accept the token of the pod's "
                    f"ServiceAccount: {said}. Check --kube-api and --kube-account"
                )
            case HTTPStatus.FORBIDDEN:
                why = (
                    f"{where} may not be read and changed: {said}. The pod's ServiceAccount needs a Role with get "
                    "and update on it"
                )
            case _:
                why = f"{where}: the API answers {status}: {said}"
        raise StoreError(why)
