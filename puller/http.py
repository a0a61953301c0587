"""`http:` and `https:` URLs: one URL, one file.

This module avoids two errors of ModelMesh, which took an answer other than 200 for a model, and did not notice
that a body was shorter than announced. `http_client` decides where requests may be sent.

A pull takes one request if possible: a GET of which only the headers are read at first. The ETag, date of change or
digest shows whether the file is already on disk; the body waits meanwhile. A file of a known version is requested with
a condition, so that no body is sent if the file is unchanged. If the server supports ranges, a large file is fetched in
several ranges at the same time, and a broken transfer continues where it ended, provided that the file is still the
same.

Compression is declined, since the announced length must be the file's own. Credentials in the URL (`user:password@`),
and the headers and certificates of an http store of the storage secret, are used for the URL's own origin only; neither
they nor the query appear in errors.
"""

import base64
import hashlib
import itertools
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp
from cachetools import LRUCache

from puller.credentials import StoreSettings
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpClient, HttpPolicy, OpenAnswer, parse, status_error
from puller.limits import PullLimits
from puller.provider import Listing, RemoteFile, version
from puller.sink import Sink
from puller.source import Location

_KNOWN = 4096  # URLs whose version is remembered, for conditional requests
_TRUSTED = 64  # stores with their own TLS settings
_SETTLED = timedelta(seconds=60)
_RANGES = " ranges"  # suffix of the key of a file whose server supports ranges


class HttpProvider:
    """The provider for `http:` and `https:`, which fetches single files by GET."""

    def __init__(self, policy: HttpPolicy, limits: PullLimits) -> None:
        self._client = HttpClient(policy, limits)
        self._limits = limits
        self._trusted: LRUCache[str, ssl.SSLContext] = LRUCache(_TRUSTED)
        self._held: dict[str, OpenAnswer] = {}
        self._counter = itertools.count()
        self._known: LRUCache[str, tuple[RemoteFile, str]] = LRUCache(_KNOWN)  # with the date of change

    async def listing(self, location: Location) -> Listing:
        """Requests the file and reads the headers. The body waits for `read`.

        A pull of a small file therefore needs only one request. A HEAD would be a second one, and signed URLs allow
        only one method.
        """
        if parse(location.uri).path.endswith("/"):
            raise _no_file(location, "ends with a slash")
        async with self._client.translated(location.shown):
            store, place = _store(location), _place(location)
            known, changed = self._known.pop(place, (None, ""))
            held = await self._get(location, _condition(known) if known is not None else {})
            try:
                if known is not None and held.response.status == HTTPStatus.NOT_MODIFIED:
                    if _unchanged(held.response.headers, known, changed):
                        held.release()
                        self._known[place] = known, changed
                        return Listing((known,), is_file=True, store=store)
                    held.release()  # two versions have the same name
                    held = await self._get(location, {})
                file = _described(held.response, location, f"{next(self._counter)}")
            except BaseException:
                held.release()
                raise
            if all(_validator(held.response.headers)):
                listed = replace(file, key=_RANGES if file.key.endswith(_RANGES) else "")
                self._known[place] = listed, held.response.headers.get("Last-Modified", "")
            self._held[file.key] = held
            return Listing((file,), is_file=True, release=lambda: self._release(file.key), store=store)

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes the body to the sink. A large body comes in several ranges at the same time if the server supports
        ranges."""
        held = self._held.pop(file.key, None)
        try:
            async with self._client.translated(location.shown):
                if file.key.endswith(_RANGES) and file.size is not None:
                    await self._read_ranges(location, file, sink, held)
                else:
                    if sink.written:
                        sink.restart()
                    held = held or await self._again(location, file)
                    await self._client.receive(held.response, sink, 0, shown=location.shown)
        finally:
            if held is not None:
                held.release()

    async def close(self) -> None:
        """Closes all connections, including those that wait for `read`."""
        for key in list(self._held):
            self._release(key)
        await self._client.close()

    def _release(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            held.release()

    async def _get(self, location: Location, headers: Mapping[str, str]) -> OpenAnswer:
        """Sends the request with the URL's own credentials, or its store's."""
        url = parse(location.uri)
        headers_of = location.settings.texts("headers")
        # Stripped: a token read from a file ends with a newline.
        secret = {name: value.strip() for name, values in headers_of.items() for value in values[-1:]}
        if url.user or url.password:
            pair = f"{url.user or ''}:{url.password or ''}".encode()
            secret["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        trust = self._trust(location.settings)
        return await self._client.send(
            url.with_user(None), shown=location.shown, headers=headers, secret=secret, trust=trust
        )

    def _trust(self, settings: StoreSettings) -> ssl.SSLContext | None:
        """Returns the TLS settings of a store that names an authority or a client certificate, or None for any other
        store."""
        name = settings.fingerprint()
        context = self._trusted.get(name)
        if context is None:
            context = trust(settings, self._client.policy)
            if context is not None:
                self._trusted[name] = context
        return context

    async def _again(self, location: Location, file: RemoteFile) -> OpenAnswer:
        """Requests the whole file again. Raises PullError if it is no longer the version that was listed."""
        held = await self._get(location, {})
        try:
            now = _described(held.response, location, "")
            if (now.size, now.validator) != (file.size, file.validator):
                # The remembered version did not distinguish the contents, so the next listing asks without it.
                self._known.pop(_place(location), None)
                raise _changed(location)
        except BaseException:
            held.release()
            raise
        return held

    async def _read_ranges(self, location: Location, file: RemoteFile, sink: Sink, held: OpenAnswer | None) -> None:
        """Reads the missing ranges in parts. The answer `held`, which is already open, brings the first part."""

        async def fetch(start: int, end: int) -> None:
            if held is not None and not start:
                await self._client.receive(held.response, sink, 0, shown=location.shown, stop_at=end)
                held.release()
                return
            part = await self._get(location, {"Range": f"bytes={start}-{end - 1}", "If-Range": file.validator})
            try:
                _check_part(part.response, location, start, end, file)
                await self._client.receive(part.response, sink, start, shown=location.shown)
            finally:
                part.release()

        try:
            await self._limits.in_parts(sink.missing(), fetch)
        except _NoRanges:
            if held is not None:  # its part was ended with the others: no waiting for a connection while holding one
                held.release()
            sink.restart()
            again = await self._again(location, file)
            try:
                await self._client.receive(again.response, sink, 0, shown=location.shown)
            finally:
                again.release()


def _described(response: aiohttp.ClientResponse, location: Location, key: str) -> RemoteFile:
    """Returns the description of the file in an answer's body, from the headers. Raises PullError for a status other
    than 200, a compressed body, or a web page."""
    if response.status != HTTPStatus.OK:
        raise status_error(response, location.shown)
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        text = f"the server sent {location.shown} compressed ({encoding}); make it send the file uncompressed"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    if _page(response, location):
        page = (
            f"a web page ({headers.get('Content-Type', '')}), not with a file: it may be a folder, or ask for a login"
        )
        todo = "register the URL of the model's file itself, with credentials if it needs them"
        raise PullError(PullErrorKind.BAD_REQUEST, f"{location.shown} is answered with {page}; {todo}")
    size = response.content_length
    validator, settled = _validator(headers)
    sha256, md5 = digests(headers)
    # All validators count, since one may stay the same while another changes. The bytes that arrive are checked against
    # the digests, so versions with different digests certainly differ.
    said = [validator, headers.get("Last-Modified", ""), sha256, md5]
    identity = version(_store(location), location.uri, " ".join(said), size) if validator or sha256 or md5 else None
    # Otherwise parts of two versions with one name could be combined.
    ranges = validator and settled and headers.get("Accept-Ranges", "").lower() == "bytes"
    return RemoteFile(
        "",
        key=key + _RANGES if ranges else key,
        size=size,
        identity=identity,
        settled=settled or bool(sha256 or md5),
        validator=validator,
        sha256=sha256,
        md5=md5,
    )


def _no_file(location: Location, why: str) -> PullError:
    text = f"{location.shown} {why}: a URL names one file, and folders of web servers are not fetched"
    return PullError(PullErrorKind.BAD_REQUEST, f"{text}; register the URL of the model's file")


def _page(response: aiohttp.ClientResponse, location: Location) -> bool:
    """Returns whether an answer is an index or a login page rather than a file: HTML at a URL without a file name, or
    HTML for a file whose name does not end as the names of HTML files do."""
    asked, answered = location.uri.partition("?")[0].partition("#")[0], response.url.path
    if response.content_type not in ("text/html", "application/xhtml+xml"):
        return False
    return not asked.lower().endswith((".html", ".htm", ".xhtml")) or answered.endswith("/")


def _store(location: Location) -> str:
    """Returns a string that identifies the origin and the caller. The caller is known by user and password, query,
    headers or certificate."""
    url = parse(location.uri)
    secret = f"{url.raw_user}\0{url.raw_password}\0{url.raw_query_string}"
    hashed = hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"http {url.origin()} {hashed} {location.settings.credentials()}"


def _place(location: Location) -> str:
    return f"{_store(location)} {location.uri}"


def _validator(headers: Mapping[str, str]) -> tuple[str, bool]:
    """Returns the header value that distinguishes versions: a strong ETag, or else a date of change, or else "". Also
    returns whether that value would certainly differ after a later change."""
    tag = headers.get("ETag", "").strip()
    strong = tag if tag.startswith('"') else ""
    changed = headers.get("Last-Modified", "")
    if strong and not changed:
        return strong, True
    try:
        # RFC 9110, 8.8.2.2: a file might change twice within the second, so only a date well past counts. Servers make
        # ETags of that date, too.
        settled = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(changed) >= _SETTLED
    except (TypeError, ValueError):
        return strong, False
    return strong or ("" if tag or not settled else changed), settled


def _unchanged(headers: Mapping[str, str], known: RemoteFile, changed: str) -> bool:
    """Returns whether an answer without a body means that the known version, with that date of change, is still the
    current one."""
    tag = known.validator if known.validator.startswith('"') else ""
    same = headers.get("ETag", tag).strip() == tag and headers.get("Last-Modified", changed) == changed
    sha256, md5 = digests(headers)
    return same and sha256 in ("", known.sha256) and md5 in ("", known.md5)


def _condition(file: RemoteFile) -> dict[str, str]:
    name = "If-None-Match" if file.validator.startswith('"') else "If-Modified-Since"
    return {name: file.validator}


def digests(headers: Mapping[str, str]) -> tuple[str, str]:
    """Returns the SHA-256 and MD5 of the body, in hex, from an answer's headers. A missing digest is "".

    The headers are Repr-Digest (RFC 9530), its predecessor Digest, Content-MD5, and the header of Google Cloud
    Storage."""
    found = {"sha-256": "", "md5": ""}
    texts = [headers.get("Digest", ""), headers.get("Repr-Digest", ""), headers.get("x-goog-hash", "")]
    if "Content-MD5" in headers:
        texts.append(f"md5={headers['Content-MD5']}")
    for text in texts:
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            name = name.lower()
            try:
                digest = base64.b64decode(value.strip().strip(":"), validate=True)
            except ValueError:
                continue
            if len(digest) == {"sha-256": 32, "md5": 16}.get(name):
                found[name] = digest.hex()
    return found["sha-256"], found["md5"]


class _NoRanges(Exception):
    """The error that a server announced ranges but answered with the whole file."""


def _check_part(response: aiohttp.ClientResponse, location: Location, start: int, end: int, file: RemoteFile) -> None:
    if response.status == HTTPStatus.OK:
        if _validator(response.headers)[0] == file.validator:
            raise _NoRanges
        raise _changed(location)
    if response.status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        raise _changed(location)
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        raise status_error(response, location.shown)
    if response.headers.get("Content-Range", "") != f"bytes {start}-{end - 1}/{file.size}":
        raise PullError(
            PullErrorKind.INTEGRITY,
            f"the server sent another part of {location.shown} than requested; check the server, or a proxy in front "
            "of it",
        )


def _changed(location: Location) -> PullError:
    return PullError(PullErrorKind.CHANGED, f"{location.shown} changed while it was fetched; try again")


def trust(settings: StoreSettings, policy: HttpPolicy) -> ssl.SSLContext | None:
    """Returns the TLS settings of a store that names certificates, or None for any other store. Raises PullError if the
    certificates are not valid."""
    authority, certificate = settings.text("certificate"), settings.text("client_certificate")
    if not authority and not certificate:
        return None
    try:
        context = ssl.create_default_context()
        if policy.ca is not None:
            context.load_verify_locations(cadata=policy.ca.decode())
        if authority:
            context.load_verify_locations(cadata=authority)
        if certificate:
            with tempfile.NamedTemporaryFile("w") as file:  # the library reads only files; only this user can read it
                file.write(f"{certificate}\n{settings.text('client_key')}\n")
                file.flush()
                context.load_cert_chain(file.name)
    except (ssl.SSLError, ValueError, OSError):
        # `from None`: no part of a key may be shown.
        text = "certificate, client_certificate and client_key must be PEM; give both client_certificate and client_key"
        raise settings.error(text) from None
    return context
