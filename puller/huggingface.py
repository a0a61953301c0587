"""`hf:` repositories of the Hugging Face hub, or of another endpoint with its API.

A revision is a branch, a tag or a commit. It is first resolved to a commit, and everything is read at that commit, so
that a push during a pull cannot mix two versions. Files in large-file storage have a SHA-256, which is checked as they
arrive; a file that this hub has already delivered for this token is not fetched again, whichever repository it is in.
Other files have git's own digest of their contents, which is used as their version if the bytes match it.

The hub sends large files from other hosts, by redirects with signed URLs, which never get the token (`http_client`).
The token comes from the storage secret (type `hf`, `token`), or else from the operator's environment.

The API: https://huggingface.co/docs/hub/api, as of 2026: `revision`, `paths-info`, `tree` (paged by Link headers),
`resolve`.
"""

import hashlib
import json
import os
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpClient, HttpPolicy, OpenAnswer, parse, status_error
from puller.limits import PullLimits
from puller.provider import Listing, RemoteFile, version
from puller.sink import Sink
from puller.source import Location
from puller.tree import MAX_FILES

ENDPOINT = "https://huggingface.co"

_MAX_ANSWER = 32 * 2**20  # bytes of one page of JSON
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEXT = re.compile(r'<([^<>]+)>\s*;[^,]*rel="?next"?')


class HuggingFaceProvider:
    """The provider for `hf:`, which fetches files and folders of repositories."""

    def __init__(self, policy: HttpPolicy, limits: PullLimits) -> None:
        self._client = HttpClient(policy, limits)
        self._limits = limits

    async def listing(self, location: Location) -> Listing:
        """Lists the file at the path, or everything below it, at the commit that the revision points to now."""
        async with self._client.translated(location.shown):
            repository, revision = _repository(location)
            commit = await self._commit(location, repository, revision)
            path = location.path.strip("/")
            if path and not location.path.endswith("/"):
                found = await self._ask(location, f"models/{repository}/paths-info/{commit}", {"paths": [path]})
                kinds = {item.get("path"): item for item in _items(found, location)}
                if (item := kinds.get(path)) is not None and item.get("type") == "file":
                    file = _remote("", item, commit, location)
                    return Listing((file,), is_file=True, store=_store(location))
            files = await self._tree(location, repository, commit, path)
        if not files:
            text = f"{location.shown} contains no files; check repository, revision and path"
            raise PullError(PullErrorKind.EMPTY, text)
        return Listing(tuple(files), is_file=False, store=_store(location))

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes the bytes of the file that the sink lacks, at the commit that was listed."""
        repository, _ = _repository(location)
        below = location.path.strip("/")
        path = "/".join(part for part in (below, file.path) if part)
        url = f"{_endpoint(location)}/{repository}/resolve/{file.key}/{quote(path)}"

        async def fetch(start: int, end: int) -> None:
            whole = not start and end == file.size
            headers = {} if whole else {"Range": f"bytes={start}-{end - 1}"}
            async with self._client.translated(location.shown):
                held = await self._send(location, parse(url), headers)
                try:
                    _check(held, location, start, end, file, whole=whole)
                    await self._client.receive(held.response, sink, start, shown=location.shown)
                finally:
                    held.release()

        await self._limits.in_parts(sink.missing(), fetch)

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()

    async def _commit(self, location: Location, repository: str, revision: str) -> str:
        found = await self._ask(location, f"models/{repository}/revision/{quote(revision, safe='')}")
        commit = found.get("sha") if isinstance(found, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise PullError(
                PullErrorKind.UNREACHABLE,
                f"{location.shown}: the hub's reply contains no commit for revision {revision}; check that "
                "HF_ENDPOINT or endpoint_url is a hub",
            )
        return commit

    async def _tree(self, location: Location, repository: str, commit: str, path: str) -> list[RemoteFile]:
        below = f"/{quote(path)}" if path else ""
        url: URL | None = parse(f"{_endpoint(location)}/api/models/{repository}/tree/{commit}{below}?recursive=true")
        files: list[RemoteFile] = []
        while url is not None:
            held = await self._send(location, url, {})
            try:
                found = await self._json(held, location)
                url = _following(held, url)
            finally:
                held.release()
            for item in _items(found, location):
                if item.get("type") != "file":
                    continue
                name = str(item.get("path", ""))
                if path:
                    name = name.removeprefix(f"{path}/")
                files.append(_remote(name, item, commit, location))
                if len(files) > MAX_FILES:
                    text = f"{location.shown} holds more than {MAX_FILES} files; name a folder below it"
                    raise PullError(PullErrorKind.TOO_LARGE, text)
        return files

    async def _ask(self, location: Location, path: str, body: Any = None) -> Any:
        held = await self._send(location, parse(f"{_endpoint(location)}/api/{path}"), {}, body)
        try:
            return await self._json(held, location)
        finally:
            held.release()

    async def _json(self, held: OpenAnswer, location: Location) -> Any:
        response = held.response
        if response.status != HTTPStatus.OK:
            raise _refusal(response, location)
        body = bytearray()
        async for piece in self._client.pieces(response, location.shown):
            body += piece
            if len(body) > _MAX_ANSWER:
                raise PullError(
                    PullErrorKind.UNREACHABLE,
                    f"{location.shown}: the hub's answer has more than {_MAX_ANSWER} bytes; check that HF_ENDPOINT "
                    "or endpoint_url is a hub",
                )
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            text = f"{location.shown}: the hub's answer is not JSON; check that HF_ENDPOINT or endpoint_url is a hub"
            raise PullError(PullErrorKind.UNREACHABLE, text) from None

    async def _send(self, location: Location, url: URL, headers: dict[str, str], body: Any = None) -> OpenAnswer:
        token = _token(location)
        secret = {"Authorization": f"Bearer {token}"} if token else {}
        return await self._client.send(url, shown=location.shown, headers=headers, secret=secret, json=body)


def _repository(location: Location) -> tuple[str, str]:
    settings = location.settings
    repository = settings.text("repository")
    return repository, settings.text("revision") or "main"


def _endpoint(location: Location) -> str:
    return (location.settings.text("endpoint_url") or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def _token(location: Location) -> str:
    """Returns the token for the endpoint. Raises PullError if the person who named the endpoint may not use that
    token."""
    settings = location.settings
    chosen = settings.overridden("endpoint_url")
    token = settings.text("token")
    if chosen and token and not settings.overridden("token"):
        raise settings.error(
            "the registration sets endpoint_url but not the token; set both, or neither", PullErrorKind.FORBIDDEN
        )
    return token or ("" if chosen else os.environ.get("HF_TOKEN", ""))


def _refusal(response: aiohttp.ClientResponse, location: Location) -> PullError:
    match response.status:
        case HTTPStatus.NOT_FOUND:
            text = f"{location.shown} does not exist: check repository, revision and path"
            return PullError(PullErrorKind.NO_BUCKET, text)
        case HTTPStatus.UNAUTHORIZED:
            # The hub answers this for private repositories and for those that do not exist alike.
            text = f"{location.shown} does not exist, or is private and needs a token (`token` in the storage secret)"
            return PullError(PullErrorKind.CREDENTIALS, text)
        case HTTPStatus.FORBIDDEN:
            text = f"{location.shown} may not be read with this token; for a gated model, accept its terms on the hub"
            return PullError(PullErrorKind.FORBIDDEN, text)
    return status_error(response, location.shown)


def _items(found: Any, location: Location) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise PullError(
            PullErrorKind.UNREACHABLE,
            f"{location.shown}: the hub's answer is not a list of files; check that HF_ENDPOINT or endpoint_url is a "
            "hub",
        )
    return found


def _remote(path: str, item: dict[str, Any], commit: str, location: Location) -> RemoteFile:
    large = item.get("lfs") or {}
    size, oid, sha256 = item.get("size"), str(item.get("oid", "")), str(large.get("oid", "")) if large else ""
    if not isinstance(size, int) or size < 0:
        text = f"{location.shown}: the hub's answer has no size{f' of {path}' if path else ''}"
        raise PullError(PullErrorKind.UNREACHABLE, f"{text}; check that HF_ENDPOINT or endpoint_url is a hub")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        sha256 = ""
    identity = None
    if tag := sha256 or (oid if _COMMIT.fullmatch(oid) else ""):
        repository, _ = _repository(location)
        place = "/".join(part for part in (repository, location.path.strip("/"), path) if part)
        identity = version(_store(location), place, tag, size)
    return RemoteFile(
        path,
        key=commit,
        size=size,
        identity=identity,
        settled=bool(sha256),
        proof=f"git {oid}" if identity and not sha256 else "",
        validator=commit,
        sha256=sha256,
    )


def _store(location: Location) -> str:
    """Returns a string that identifies the hub and the caller."""
    token = hashlib.blake2b(_token(location).encode(), digest_size=16).hexdigest()
    return f"hf {_endpoint(location)} {location.settings.credentials()} {token}"


def _check(held: OpenAnswer, location: Location, start: int, end: int, file: RemoteFile, *, whole: bool) -> None:
    response = held.response
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        if response.headers.get("Content-Range", "") != f"bytes {start}-{end - 1}/{file.size}":
            raise PullError(
                PullErrorKind.INTEGRITY,
                f"the hub sent another part of {location.shown} than requested; check the hub, or a proxy in front of "
                "it",
            )
    elif response.status == HTTPStatus.OK and not whole:
        text = f"{location.shown}: the hub sent the whole file although only a part was requested; "
        raise PullError(PullErrorKind.UNREACHABLE, text + "check the hub, or a proxy in front of it")
    elif response.status != HTTPStatus.OK:
        raise _refusal(response, location)


def _following(held: OpenAnswer, url: URL) -> URL | None:
    """Returns the URL of the next page. It must be on the same host, because the token is sent there."""
    match = _NEXT.search(held.response.headers.get("Link", ""))
    if match is None:
        return None
    following = parse(match[1], url)
    return following if following.origin() == url.origin() else None
