"""A store that makes any claims about its files that a test wants: S3, a web server and a hub in one, over real HTTP.

The version that a store reports for a file is only a claim. This store can claim anything: one ETag for all files,
times that never change, another file's digest. It identifies callers by their credentials, refuses bodies to those who
may not read them, and records which bytes it delivered to which caller.
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from aiohttp import web

OLD = datetime(2020, 1, 1, tzinfo=UTC)
HUB_COMMIT = "c" * 40


@dataclass(frozen=True)
class File:
    """A file, and what the store claims about it."""

    content: bytes
    etag: str = '"same"'
    changed: datetime | None = OLD  # None: the store does not say
    sha256: str = ""  # announced, in hex, in Repr-Digest or as the hub's LFS oid
    oid: str = ""  # of the hub; "": the right one

    def says_nothing_else(self, before: "File", place: str) -> bool:
        """Returns whether the store makes the same claims about this file as about the one before, so that nothing
        distinguishes the contents."""
        size, former = len(self.content), len(before.content)
        match place.split("/")[1]:
            case "s3":
                return (self.etag, self.changed, size) == (before.etag, before.changed, former)
            case "hub":
                said, then = (self.oid or self.content, self.sha256), (before.oid or before.content, before.sha256)
                return (*said, size) == (*then, former)
        # The answer "Not modified" depends on the ETag only and has no size, and an omitted value says nothing.
        return (
            self.etag == before.etag
            and (bool(self.etag) or size == former)
            and self.changed in (None, before.changed)
            and self.sha256 in ("", before.sha256)
        )


@dataclass
class Liar:
    """One endpoint, with files at `/s3/bucket/key`, `/www/path` and `/hub/owner/repo/path`."""

    port: int = 0
    files: dict[str, File] = field(default_factory=dict)
    may_read: Callable[[str, str], bool] = lambda who, place: True
    delivered: list[tuple[str, str, bytes]] = field(default_factory=list)  # caller, place and bytes of each delivery
    answer_instead: Callable[[web.BaseRequest], web.StreamResponse | None] = lambda request: None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if (instead := self.answer_instead(request)) is not None:
            return instead
        who = _who(request)
        kind, *rest = request.path[1:].split("/")
        if kind == "hub":
            return await self._hub(request, who, rest)
        if (kind == "s3" and len(rest) == 1) or request.query.get("list-type"):
            return self._list(rest[0], request.query.get("prefix", ""))
        return self._file(request, who, request.path)

    def _file(self, request: web.BaseRequest, who: str, place: str) -> web.StreamResponse:
        file = self.files.get(place)
        if file is None:
            return web.Response(status=404)
        if not self.may_read(who, place):
            return web.Response(status=403)
        headers = {"ETag": file.etag} if file.etag else {}
        if file.changed is not None:
            headers["Last-Modified"] = format_datetime(file.changed, usegmt=True)
        if file.sha256:
            headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(file.sha256)).decode()}:"
        if request.headers.get("If-None-Match") == file.etag != "":
            return web.Response(status=304, headers=headers)
        if request.method != "HEAD":
            self.delivered.append((who, place, file.content))
        return web.Response(body=file.content, headers=headers)

    def _list(self, bucket: str, prefix: str) -> web.StreamResponse:
        found = []
        for place, file in sorted(self.files.items()):
            _, _, kind, *rest = f"/{place}".split("/")
            key = "/".join(rest[1:])
            if kind == "s3" and rest[0] == bucket and key.startswith(prefix):
                when = (file.changed or OLD).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                etag = file.etag.replace('"', "&quot;")
                found.append(
                    f"<Contents><Key>{key}</Key><LastModified>{when}</LastModified><ETag>{etag}</ETag>"
                    f"<Size>{len(file.content)}</Size></Contents>"
                )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
        return web.Response(text=body, content_type="application/xml")

    async def _hub(self, request: web.BaseRequest, who: str, rest: list[str]) -> web.StreamResponse:
        match rest:
            case ["api", "models", _, _, "revision", _]:
                return web.json_response({"sha": HUB_COMMIT})
            case ["api", "models", owner, repository, "paths-info", _]:
                wanted = json.loads(await request.read())["paths"]
                found = [self._item(f"/hub/{owner}/{repository}", path) for path in wanted]
                return web.json_response([item for item in found if item])
            case [owner, repository, "resolve", _, *path]:
                return self._file(request, who, f"/hub/{owner}/{repository}/{'/'.join(path)}")
        return web.Response(status=404)

    def _item(self, repository: str, path: str) -> dict[str, object] | None:
        file = self.files.get(f"{repository}/{path}")
        if file is None:
            return None
        oid = file.oid or hashlib.sha1(b"blob %d\0" % len(file.content) + file.content).hexdigest()
        item: dict[str, object] = {"type": "file", "path": path, "size": len(file.content), "oid": oid}
        if file.sha256:
            item["lfs"] = {"oid": file.sha256, "size": len(file.content)}
        return item


def _who(request: web.BaseRequest) -> str:
    """Returns the caller's S3 key, token or password."""
    text = request.headers.get("Authorization", "")
    if match := re.search(r"Credential=([^/]+)/", text):
        return match[1]
    if text.startswith("Basic "):
        return base64.b64decode(text[6:]).decode().partition(":")[0]
    return text.removeprefix("Bearer ")


@asynccontextmanager
async def liars(count: int = 1) -> AsyncIterator[list[Liar]]:
    """Starts that many endpoints, and stops them at the end."""
    made: list[Liar] = []
    runners = []
    try:
        for _ in range(count):
            liar = Liar()
            server = web.Server(lambda request, liar=liar: liar.answer(request), handler_cancellation=True)
            runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            liar.port = runner.addresses[0][1]
            made.append(liar)
        yield made
    finally:
        for runner in runners:
            await runner.cleanup()


_serial = itertools.count()


def unique(size: int) -> bytes:
    """Returns bytes that no other file has."""
    return f"{next(_serial)}:".encode().ljust(size, b".")


def recent() -> datetime:
    """Returns a modification time so recent that another change may have the same one."""
    return datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1)
