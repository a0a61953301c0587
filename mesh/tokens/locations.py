"""The locations of an issuer's keys: a file, a URL, the issuer's discovery document, or the Kubernetes API.

Each answer is bounded in size and time. HTTPS is required beyond this machine, because an attacker who changes the keys
on their way can sign any token. Redirects are not followed, so the keys come from where the operator said.
"""

import email.utils
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson

from mesh.tokens import keyset, places

TIMEOUT = 5.0
"""Time limit of one answer, in seconds."""

DISCOVERY = "/.well-known/openid-configuration"
CLUSTER_KEYS = "/openid/v1/jwks"
_ACCEPT = "application/jwk-set+json, application/json"  # Kubernetes answers 406 for its keys without the first

_OK = 200


class LocationError(Exception):
    """A failure to read keys. The text says why, for operators."""


@dataclass(frozen=True, slots=True)
class KeyDocument:
    """The keys as they were published."""

    raw: bytes
    issuer: str = ""  # as the location states it; empty: it does not
    ahead: float | None = None  # seconds by which this machine's clock is ahead of the location's


class Location(Protocol):
    """A location that publishes keys."""

    async def read(self) -> KeyDocument:
        """Returns the keys. Raises LocationError."""

    def changed(self) -> bool | None:
        """Returns whether the location has other keys than those read last, or None if only a reading can show that.
        Does not wait."""


class File:
    """Keys in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    async def read(self) -> KeyDocument:
        """Returns the content of the file. Raises LocationError."""
        self._seen = self._stat()
        try:
            with self._path.open("rb") as file:
                return KeyDocument(file.read(keyset.MAX_BYTES + 1))
        except OSError as error:
            raise LocationError(f"{self._path} cannot be read: {error.strerror}") from error

    def changed(self) -> bool:
        """Returns whether the file was replaced or written since the last reading."""
        return self._stat() != self._seen

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


class Remote:
    """Keys at a URL. Without `keys`, the issuer's discovery document names the URL."""

    def __init__(
        self, issuer: str, keys: str = "", *, ca: Path | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        """Makes the location. `ca` is a PEM file with the authorities to trust, instead of the system's."""
        self._issuer = issuer
        self._keys = keys
        self._found = ""
        self._ca = ca
        self._wall = wall

    async def read(self) -> KeyDocument:
        """Returns the keys. Raises LocationError."""
        async with session(self._tls()) as http:
            keys = self._keys or self._found or await self._discovered(http)
            self._found = ""  # after a failure it is looked for again: the issuer may have moved its keys
            raw, ahead = await get(http, keys, wall=self._wall)
            self._found = keys
            return KeyDocument(raw, self._issuer, ahead)

    def changed(self) -> None:
        """Returns None, because only a reading can show a change."""

    async def _discovered(self, http: aiohttp.ClientSession) -> str:
        url = self._issuer.rstrip("/") + DISCOVERY
        document = discovery(url, (await get(http, url, wall=self._wall))[0])
        if document["issuer"] != self._issuer:
            raise LocationError(
                f"{url} is about another issuer, {document['issuer']!r:.200}: write the issuer (--auth-jwt-issuer) "
                "exactly as in this document"
            )
        keys = str(document["jwks_uri"])
        try:
            places.check(keys)
        except ValueError as error:
            raise LocationError(f"{url} gives {keys:.200} as the keys' URL: {error}") from error
        return keys

    def _tls(self) -> ssl.SSLContext | bool:
        if self._ca is None:
            return True
        try:
            return ssl.create_default_context(cafile=str(self._ca))
        except ssl.SSLError as error:
            raise LocationError(f"{self._ca} contains no valid certificates in PEM: {error}") from error
        except OSError as error:
            raise LocationError(f"{self._ca} cannot be read: {error.strerror or error}") from error


def discovery(url: str, raw: bytes) -> Mapping[str, Any]:
    """Returns the discovery document of an issuer. Raises LocationError."""
    try:
        document = orjson.loads(raw)
    except ValueError as error:
        raise LocationError(f"{url} does not answer with JSON") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(one), str) for one in ("issuer", "jwks_uri")):
        raise LocationError(f"{url} is not a discovery document: it lacks issuer or jwks_uri")
    return document


def session(tls: "ssl.SSLContext | bool", *, inside: bool = False) -> aiohttp.ClientSession:
    """Returns a session for a few requests. With `inside`, the environment's proxies are ignored."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT), connector=aiohttp.TCPConnector(ssl=tls), trust_env=not inside
    )


async def get(
    http: aiohttp.ClientSession, url: str, *, wall: Callable[[], float], headers: Mapping[str, str] | None = None
) -> tuple[bytes, float | None]:
    """Returns the body at a URL, and by how many seconds this machine's clock is ahead of the server's, or None if the
    server does not give the time. Raises LocationError."""
    try:
        async with http.get(url, headers={"accept": _ACCEPT, **(headers or {})}, allow_redirects=False) as got:
            if got.status != _OK:
                raise LocationError(f"{url} answers {got.status}{_moved(got)}")
            return await body(got), _ahead(got.headers.get("date", ""), wall())
    except TimeoutError as error:
        raise LocationError(f"{url} has not answered within {TIMEOUT:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise LocationError(f"{url} cannot be reached: {str(error) or 'the connection was lost'}") from error


async def body(answer: aiohttp.ClientResponse) -> bytes:
    """Returns the body of an answer. Raises LocationError if it is too large."""
    raw = b""
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > keyset.MAX_BYTES:
            raise LocationError(
                f"the answer of {answer.url} exceeds the limit of {keyset.MAX_BYTES // 1024} KiB: check the URL"
            )
    return raw


def _moved(answer: aiohttp.ClientResponse) -> str:
    to = answer.headers.get("location", "")
    return f", to {to:.200}: name that URL instead" if to else ""


def _ahead(date: str, now: float) -> float | None:
    try:
        return now - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None
