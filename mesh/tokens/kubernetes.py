"""Service accounts of Kubernetes: the API server is asked about a token (TokenReview), or publishes its keys.

A review also finds out that a token's pod or account was deleted, and needs the right to create TokenReviews
(ClusterRole `system:auth-delegator`). The keys can be read by every pod, but a token that they verify is valid until it
expires.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
import orjson

from mesh.certificates.keeping import StoreError
from mesh.certificates.secret import Cluster
from mesh.tokens import locations
from mesh.tokens.locations import KeyDocument, LocationError

REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"

MAX_AT_ONCE = 16
"""Largest number of reviews in flight. Kubernetes answers one in milliseconds."""


@dataclass(frozen=True, slots=True)
class Review:
    """The answer of Kubernetes about one token."""

    authenticated: bool
    username: str = ""
    groups: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()  # those of the request that the token is for
    error: str = ""


class Reviewer:
    """A client of TokenReview."""

    def __init__(self, cluster: Cluster, audiences: Sequence[str]) -> None:
        """Makes a client. Without `audiences`, tokens must be for the API server itself."""
        self._cluster = cluster
        self._audiences = tuple(audiences)
        self._session: aiohttp.ClientSession | None = None
        self._turn = asyncio.Semaphore(MAX_AT_ONCE)

    async def review(self, token: bytes) -> Review:
        """Asks Kubernetes about a token, and returns the answer. Raises LocationError if there is no usable answer."""
        spec: dict[str, Any] = {"token": token.decode("latin-1")}
        if self._audiences:
            spec["audiences"] = list(self._audiences)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            async with asyncio.timeout(locations.TIMEOUT), self._turn:
                status, raw = await self._post(body)
        except TimeoutError as error:
            text = f"the Kubernetes API at {self._cluster.url} has not answered within {locations.TIMEOUT:g} s"
            raise LocationError(text) from error
        except StoreError as error:
            raise LocationError(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            await self.close()  # the next request reads the authority again
            raise LocationError(f"the Kubernetes API at {self._cluster.url} cannot be reached: {error}") from error
        return self._judged(status, raw)

    async def close(self) -> None:
        """Closes the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        if self._session is None:
            self._session = locations.session(self._cluster.trust(), inside=True)
        headers = {"authorization": f"Bearer {self._cluster.read('token')}"}
        async with self._session.post(self._cluster.url + REVIEWS, json=body, headers=headers) as answer:
            return answer.status, await locations.body(answer)

    def _judged(self, status: int, raw: bytes) -> Review:
        where = f"the Kubernetes API at {self._cluster.url}"
        if status == HTTPStatus.UNAUTHORIZED:
            raise LocationError(
                f"{where} does not accept the token of this pod's ServiceAccount ({status}): check that the pod mounts "
                "a token of this cluster (automountServiceAccountToken)"
            )
        if status == HTTPStatus.FORBIDDEN:
            raise LocationError(
                f"{where} does not let this pod review tokens ({status}): bind its ServiceAccount to the ClusterRole "
                "system:auth-delegator, or verify tokens by the cluster's keys (--auth-kubernetes keys)"
            )
        if status not in (HTTPStatus.OK, HTTPStatus.CREATED):
            raise LocationError(f"{where} answers a TokenReview with {status}")
        try:
            review = _review(orjson.loads(raw)["status"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LocationError(f"{where} does not answer with a TokenReview") from error
        if review.authenticated and self._audiences and not set(self._audiences) & set(review.audiences):
            # Kubernetes' documentation demands this check: a server that knows no audiences ignores them.
            return Review(False, error=f"the token is not for the audience {self._audiences[0]}")
        return review


class ClusterKeys:
    """The keys with which a cluster signs the tokens of its service accounts."""

    def __init__(self, cluster: Cluster, *, wall: Callable[[], float] = time.time) -> None:
        self._cluster = cluster
        self._wall = wall

    async def read(self) -> KeyDocument:
        """Returns the keys, and the cluster's issuer. Raises LocationError."""
        try:
            trust, token = self._cluster.trust(), self._cluster.read("token")
        except StoreError as error:
            raise LocationError(str(error)) from error
        headers = {"authorization": f"Bearer {token}"}
        async with locations.session(trust, inside=True) as http:
            url = self._cluster.url + locations.DISCOVERY
            raw, _ = await locations.get(http, url, wall=self._wall, headers=headers)
            issuer = locations.discovery(url, raw)["issuer"]
            # At the API server itself: the document may name an address for clients outside.
            url = self._cluster.url + locations.CLUSTER_KEYS
            raw, ahead = await locations.get(http, url, wall=self._wall, headers=headers)
            return KeyDocument(raw, issuer, ahead)

    def changed(self) -> None:
        """Returns None, because only a reading can show a change."""


def _review(status: Mapping[str, Any]) -> Review:
    user = status.get("user") or {}
    return Review(
        authenticated=status.get("authenticated") is True,
        username=str(user.get("username", "")),
        groups=tuple(str(one) for one in user.get("groups") or ()),
        audiences=tuple(str(one) for one in status.get("audiences") or ()),
        error=str(status.get("error", "")),
    )
