"""S3, Google Cloud Storage and Azure Blob Storage, and other stores with their APIs.

These stores have keys and no folders. A location without "/" at its end is the object with that key if it exists,
otherwise everything below it; a location with "/" at its end is always everything below it. Both rules are
ModelMesh's, except that an empty location is an error here, as is a location with more objects than a model can have.

Consoles mark folders by empty objects whose key ends in "/"; obstore lists them without the "/". To tell them from
empty files, the key without "/" is requested: if no object has it, it is a folder.

Large objects are fetched in several ranges, each with If-Match, so that all are of one version; the answer's ETag is
compared too, for servers that ignore the condition. Streams are awaited on the event loop, so that a cancelled pull
ends immediately (obstore then closes the socket), and written in threads. A thread for each range, as with obstore's
own synchronous streams, was no faster (1 GiB in 8 ranges, 2 shared cores) and could only end when the store sends
again.

A version is identified by the object's key, ETag and time of change. Some servers give every object the same ETag. An
object that changed within the last minute is therefore only recognised by its version if its ETag is the MD5 of the
bytes that arrive.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import obstore
import obstore.exceptions

from puller import http, objects_client, objects_errors, objects_listing, tree
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpClient, HttpPolicy
from puller.limits import PullLimits
from puller.objects_client import Target
from puller.objects_listing import Lister
from puller.provider import Listing, RemoteFile, version
from puller.sink import Sink
from puller.source import Location
from puller.tree import MAX_FILES
from puller.tunnel import Tunnel

_CHUNK = 64 * 2**10  # minimum bytes of a stream within a time-out: at least 2 KiB per second
_BATCH = 4 * 2**20  # bytes collected for one hop to a thread
_SMALL = 256 * 2**10  # maximum bytes of a body that is read in one piece and written at once on the event loop
_WRITERS = 4
_CLIENT_LIFE = 3600.0  # seconds without use after which a client is replaced; ModelMesh's value
_MAX_CLIENTS = 256
_PROBES = 16  # empty objects asked for at a time
_MD5 = re.compile(r"[0-9a-f]{32}")
_SETTLED = timedelta(seconds=60)  # age by two clocks; times in listings are whole seconds

_Errors = (obstore.exceptions.BaseError, OSError, ValueError)


@dataclass(slots=True)
class _Client:
    target: Target
    used: float  # monotonic seconds


class ObjectProvider:
    """The provider for `s3:`, `gs:` and `azure:`."""

    def __init__(self, policy: HttpPolicy, limits: PullLimits) -> None:
        """Makes a provider. `policy` gives timeouts, trusted authorities, and the endpoints that registrations may
        name."""
        self._policy = policy
        self._limits = limits
        self._clients: dict[str, _Client] = {}
        self._tunnel: Tunnel | None = None
        self._guarded = HttpClient(policy, limits)
        self._free = HttpClient(replace(policy, allow_private=True), limits)
        self._executor: ThreadPoolExecutor | None = None
        self._on_google: bool | None = None

    async def listing(self, location: Location) -> Listing:
        """Lists the object of that key, or all objects below it."""
        target = await self._target(location)
        key = location.path.strip("/")
        refused: BaseException | None = None
        if key and not location.path.endswith("/"):
            try:
                async with self._limits.connection(target.host), self._answered(location):
                    meta = await obstore.head_async(target.client, key)
                file = _remote("", key, meta, target, location)
                return Listing((file,), is_file=True, store=_store(target, location))
            except _Errors as error:
                status, _ = objects_errors.code_of(error)
                if not isinstance(error, FileNotFoundError) and not 400 <= status < 500:
                    raise objects_errors.translated(error, location.shown, target) from None
                # An answer to HEAD has no body and thus no reason; the listing's answer has one.
                refused = error
        found = await self._everything(location, target, key)
        if not found and refused is not None:
            raise objects_errors.translated(refused, location.shown, target) from None
        if not found:
            raise PullError(
                PullErrorKind.EMPTY, f"{location.shown} contains no objects; check the path of the registration"
            )
        return await self._tree(location, target, key, found)

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes the bytes of the listed version that the sink lacks."""
        target = await self._target(location)

        async def fetch(start: int, end: int) -> None:
            async with self._limits.connection(target.host):
                await self._receive(location, target, file, sink, start, end)

        if not file.validator:
            # The version of a second answer would be unknown.
            sink.restart()
            await fetch(0, file.size or 0)
        else:
            await self._limits.in_parts(sink.missing(), fetch)

    async def close(self) -> None:
        """Drops the clients, whose connections obstore closes, and ends all other connections and threads."""
        self._clients.clear()
        if self._tunnel is not None:
            tunnel, self._tunnel = self._tunnel, None
            await asyncio.to_thread(tunnel.close)
        await self._guarded.close()
        await self._free.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    async def _target(self, location: Location) -> Target:
        """Returns the client for a location: a new one, or the one from an earlier use with the same settings."""
        settings = location.settings
        now = time.monotonic()
        name = settings.fingerprint()
        held = self._clients.pop(name, None)
        if held is None or now - held.used > _CLIENT_LIFE:
            if self._on_google is None and settings.type == "gcs":
                self._on_google = await _on_google()
            if objects_client.chosen(settings):
                await self._check(objects_client.endpoint_of(settings), location.shown)
            if self._tunnel is None:
                self._tunnel = Tunnel(
                    self._policy.refusal, connect_timeout=self._policy.connect_timeout, proxies=self._policy.proxies
                )
            target = objects_client.connect(
                settings, self._policy, on_google=bool(self._on_google), tunnel=self._tunnel
            )
            held = _Client(target, now)
        held.used = now
        self._clients[name] = held  # moved to the end, so that the least recently used come first
        while len(self._clients) > _MAX_CLIENTS:
            del self._clients[next(iter(self._clients))]
        return held.target

    async def _check(self, endpoint: str, shown: str) -> None:
        """Raises PullError for an endpoint that registrations must not reach. For a name, this is only true at the
        moment of the check."""
        if not endpoint:
            return
        host = re.sub(r"^https?://|/.*$", "", endpoint)
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            async with asyncio.timeout(self._policy.connect_timeout):
                found = await asyncio.get_running_loop().getaddrinfo(host, None)
        except (OSError, TimeoutError, UnicodeError):
            text = f"{shown} at {endpoint}: the name of its host cannot be resolved; check its spelling"
            raise PullError(PullErrorKind.DNS, text) from None
        for *_, address in found:
            why = self._policy.refusal(str(address[0]))
            if why is not None:
                text = f"{shown} at {endpoint}: {address[0]} is {why}, which a registration must not name"
                raise PullError(PullErrorKind.FORBIDDEN, f"{text}; name the endpoint in the storage secret instead")

    async def _everything(self, location: Location, target: Target, key: str) -> list[Any]:
        found: list[Any] = []
        try:
            async with self._limits.connection(target.host):
                pages = aiter(obstore.list(target.client, key or None, chunk_size=1000))
                while True:
                    async with self._answered(location, pages=2):
                        page = await anext(pages, None)
                    if page is None:
                        break
                    found.extend(page)
                    if len(found) > 2 * MAX_FILES:
                        text = f"{location.shown} holds more than {MAX_FILES} objects; name a folder below it"
                        raise PullError(PullErrorKind.TOO_LARGE, text)
        except obstore.exceptions.InvalidPathError as error:
            if target.lister is None:
                raise objects_errors.translated(error, location.shown, target) from None
            return await self._by_hand(location, target.lister, key)
        except _Errors as error:
            raise objects_errors.translated(error, location.shown, target) from None
        return found

    async def _by_hand(self, location: Location, lister: Lister, key: str) -> list[Any]:
        """Lists all objects without obstore, because one of the keys is not a path."""
        settings = location.settings
        # The operator's own endpoints may be anywhere; redirects are not followed.
        client = self._guarded if objects_client.chosen(settings) else self._free
        return await objects_listing.everything(
            client,
            lister,
            prefix=f"{key}/" if key else "",
            most=2 * MAX_FILES,
            shown=location.shown,
            trust=http.trust(settings, self._policy),
        )

    async def _tree(self, location: Location, target: Target, key: str, found: Sequence[Any]) -> Listing:
        start = len(key) + 1 if key else 0
        faults = {meta["path"]: tree.fault(meta["path"][start:]) for meta in found if meta["path"][start:]}
        skipped = tuple(f"{path[start:][:200]!r} {why}" for path, why in faults.items() if why)
        found = [meta for meta in found if not faults.get(meta["path"])]
        above: set[str] = set()
        for meta in found:
            path = meta["path"]
            while (slash := path.rfind("/", start)) > 0 and (path := path[:slash]) not in above:
                above.add(path)
        folders, files, doubtful = [], [], []
        for meta in found:
            path = meta["path"]
            if not path[start:]:
                continue  # the marker of the location itself
            if meta["size"]:
                files.append(_remote(path[start:], path, meta, target, location))
            elif path in above:
                folders.append(path[start:])
            else:
                doubtful.append(meta)
        slots = asyncio.Semaphore(_PROBES)

        async def there(meta: Any) -> bool:
            try:
                async with slots, self._limits.connection(target.host), self._answered(location):
                    await obstore.head_async(target.client, meta["path"])
                return True
            except FileNotFoundError:
                return False
            except _Errors as error:
                raise objects_errors.translated(error, location.shown, target) from None

        for meta, is_file in zip(doubtful, await _gathered([there(meta) for meta in doubtful]), strict=True):
            path = meta["path"]
            if is_file:
                files.append(_remote(path[start:], path, meta, target, location))
            else:
                folders.append(path[start:])
        if not files:
            more = f": {tree.told(skipped)}" if skipped else ""
            raise PullError(
                PullErrorKind.EMPTY,
                f"{location.shown} contains no files that can be part of a model{more}; register the model's path",
            )
        return Listing(
            tuple(files),
            is_file=False,
            folders=tuple(folders),
            skipped=skipped,
            store=_store(target, location),
        )

    async def _receive(
        self, location: Location, target: Target, file: RemoteFile, sink: Sink, start: int, end: int
    ) -> None:
        options: dict[str, Any] = {"if_match": file.validator} if file.validator else {}
        if (start, end) != (0, file.size):
            options["range"] = (start, end)
        try:
            async with self._answered(location):
                answer = await obstore.get_async(target.client, file.key, options=options)  # type: ignore[arg-type]
            meta = answer.meta
            if file.validator and _validator(meta) not in ("", file.validator):
                raise PullError(PullErrorKind.CHANGED, f"{location.shown} changed while it was fetched; try again")
            if answer.range != (start, end) or meta["size"] != file.size:
                raise PullError(
                    PullErrorKind.CHANGED, f"{location.shown} changed its size while it was fetched; try again"
                )
            if end - start <= _SMALL:
                # A few bytes arrive at once, or not in time.
                async with self._answered(location):
                    body = memoryview(await answer.bytes_async())
                sink.write(body, start)
                await self._pace(len(body))
                return
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_WRITERS, thread_name_prefix="puller-objects")
            loop, at, pending = asyncio.get_running_loop(), start, 0
            pieces: list[Any] = []
            stream = aiter(answer.stream(min_chunk_size=_CHUNK))
            while True:
                async with self._answered(location):
                    piece = await anext(stream, None)
                if piece is not None:
                    pieces.append(piece)
                    pending += len(piece)
                if piece is None or pending >= _BATCH:
                    # If a cancelled pull abandons the thread, it still ends by itself, and the sink waits for it.
                    await loop.run_in_executor(self._executor, _write, sink, at, pieces)
                    await self._pace(pending)
                    at, pending, pieces = at + pending, 0, []
                if piece is None:
                    return
        except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            raise objects_errors.translated(error, location.shown, target) from None

    @asynccontextmanager
    async def _answered(self, location: Location, *, pages: int = 1) -> AsyncIterator[None]:
        """Limits the total wait for the store, because the client only limits the pauses between two bytes. Raises
        PullError(SLOW)."""
        seconds = pages * (self._policy.connect_timeout + self._policy.read_timeout)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            text = (
                f"{location.shown}: the store has not answered within {seconds:g} s; check the store, and the network "
            )
            raise PullError(PullErrorKind.SLOW, text + "between it and the pods") from None

    async def _pace(self, count: int) -> None:
        if delay := self._limits.take(count):
            await asyncio.sleep(delay)


def _write(sink: Sink, at: int, pieces: list[Any]) -> None:
    for piece in pieces:
        sink.write(piece, at)
        at += len(piece)


def _remote(path: str, key: str, meta: Any, target: Target, location: Location) -> RemoteFile:
    tag = _validator(meta)
    bare = tag.strip('"')
    changed: datetime = meta["last_modified"]
    identity = None
    if bare and not tag.startswith("W/"):
        # In whole seconds: some stores are more precise in listings than for a single object.
        identity = version(_store(target, location), key, f"{bare} {int(changed.timestamp())}", meta["size"])
    return RemoteFile(
        path,
        key,
        meta["size"],
        identity=identity,
        settled=datetime.now(UTC) - changed > _SETTLED,
        proof=f"md5 {bare}" if location.scheme == "s3" and _MD5.fullmatch(bare) else "",
        validator=tag,
    )


def _store(target: Target, location: Location) -> str:
    """Returns a string that identifies the bucket, its endpoint and the caller."""
    settings = location.settings
    place = settings.text("bucket") or settings.text("container")
    return f"{location.scheme} {target.endpoint} {place} {settings.credentials()} {target.ambient}"


def _validator(meta: Any) -> str:
    """Returns the ETag as conditions need it, in quotes: Azure's listings omit them."""
    tag = meta["e_tag"] or ""
    return tag if not tag or tag.endswith('"') else f'"{tag}"'


async def _gathered(coroutines: Sequence[Any]) -> list[Any]:
    """Returns the results of all coroutines. The first error cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _on_google() -> bool:
    """Returns whether this is a Google machine. The name of the metadata service only resolves there."""
    try:
        async with asyncio.timeout(2.0):
            await asyncio.get_running_loop().getaddrinfo("metadata.google.internal.", 80)
    except (OSError, TimeoutError):
        return False
    return True
