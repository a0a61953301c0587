"""One run of the demo against a running mesh: register, send, read the counters, report."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import grpc
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from yarl import URL

from mesh.demo import numbers
from mesh.demo.calls import Caller, GrpcCaller, RestCaller
from mesh.demo.fleet.catalogue import Fleet
from mesh.demo.report import Report
from mesh.demo.traffic import Traffic

CALL_TIMEOUT = 30.0
IMPORT_TIMEOUT = aiohttp.ClientTimeout(total=120.0, sock_connect=10.0)


class DemoError(Exception):
    """The reason why a run failed."""


async def run_demo(
    endpoint: str,
    fleet: Fleet,
    *,
    seconds: float = 30.0,
    requests: int = 0,
    clients: int = 8,
    skew: float = 1.0,
    seed: int = 0,
    grpc_endpoint: str = "",
    root_pid: int | None = None,
    console: Console | None = None,
) -> Report:
    """Registers the fleet at `endpoint` (a URL), and sends requests until `seconds` have passed or `requests` have
    ended (0: no limit).

    `grpc_endpoint` (`host:port`) is needed if gRPC has another port. The report has the memory of `root_pid` and its
    descendants, if given. Progress is drawn on `console`, if given. Raises DemoError.
    """
    base = endpoint.rstrip("/")
    # A call may wait for a load, and each waiting call needs a connection.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            await register(session, base, fleet)
            async with callers(session, base, grpc_endpoint or urlsplit(base).netloc, clients) as ways:
                traffic = Traffic(fleet, ways, clients=clients, skew=skew, seed=seed)
                await asyncio.to_thread(traffic.prepare)
                before = await numbers.ask(session, base)
                started = time.monotonic()
                with _shown(console, traffic, seconds, requests):
                    tally = await traffic.run(seconds=seconds, requests=requests)
                took = time.monotonic() - started
            after = await numbers.ask(session, base)
        except (aiohttp.ClientError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise DemoError(f"{base} gave no usable answer ({why}): check that a mesh runs there") from error
    taken = await asyncio.to_thread(numbers.processes, root_pid) if root_pid is not None else []
    return Report(len(fleet.models), fleet.memory_bytes, fleet.missing, took, tally, before, after, tuple(taken))


async def register(session: aiohttp.ClientSession, base: str, fleet: Fleet) -> None:
    """Registers every model in one import. Models that are already registered with the same attributes stay unchanged.
    Raises DemoError."""
    lines = (
        json.dumps({"id": sample.id, "type": sample.type, "path": str(sample.path), "key": ""}) + "\n"
        for sample in fleet.models
    )
    body = "".join(lines).encode()
    headers = {"Content-Type": "application/x-ndjson"}
    url = f"{base}/mesh/v1/models:import"
    async with session.post(url, data=body, headers=headers, timeout=IMPORT_TIMEOUT) as response:
        answers = [json.loads(line) for line in (await response.read()).splitlines() if line.strip()]
    for answer in answers:
        if isinstance(answer.get("error"), dict):
            failed = answer["error"]
            raise DemoError(f"{failed.get('id')} cannot be registered: {failed.get('text')}")
        if "error" in answer:
            raise DemoError(f"the fleet cannot be registered: {answer['error']}")
    if not answers or not answers[-1].get("finished"):
        raise DemoError("the import of the fleet was interrupted: run the demo again")
    if answers[-1].get("existing"):
        await _reload_changed(session, base, fleet)


async def _reload_changed(session: aiohttp.ClientSession, base: str, fleet: Fleet) -> None:
    """Reloads the models whose files differ from those that the mesh knows. This happens if the mesh's data is left
    from an earlier demo, and other versions of the libraries have since written different files. Raises DemoError."""
    made = {sample.id: sample.sha256 for sample in fleet.models}
    after: str | None = ""
    while after is not None:
        page = await _json(session.get(f"{base}/mesh/v1/models", params={"limit": "1000", "after": after}))
        for model in page["models"]:
            if model.get("digest") and model["digest"] != made.get(model["id"], model["digest"]):
                path = f"/mesh/v1/models/{quote(model['id'], safe='')}/reload"
                await _json(session.post(URL(base + path, encoded=True)))
        after = page["next"]


async def _json(request: "contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]") -> Any:
    async with request as response:
        answer = json.loads(await response.read())
        if not response.ok:
            raise DemoError(f"the fleet cannot be reloaded: {answer.get('error')}")
        return answer


@contextlib.asynccontextmanager
async def callers(
    session: aiohttp.ClientSession, base: str, grpc_address: str, connections: int, timeout: float = CALL_TIMEOUT
) -> AsyncIterator[Sequence[Caller]]:
    """Yields callers for all ways to call the mesh, with `connections` gRPC channels, but at most four."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 * 2**20)]
    channels = [grpc.aio.insecure_channel(grpc_address, options=options) for _ in range(max(1, min(connections, 4)))]
    ways: list[Caller] = []
    for channel in channels:
        ways.append(GrpcCaller(channel, typed=False, timeout=timeout))
        ways.append(RestCaller(session, base, binary=False, timeout=timeout))
        ways.append(GrpcCaller(channel, typed=True, timeout=timeout))
        ways.append(RestCaller(session, base, binary=True, timeout=timeout))
    try:
        yield ways
    finally:
        for channel in channels:
            await channel.close(None)


@contextlib.contextmanager
def _shown(console: Console | None, traffic: Traffic, seconds: float, requests: int) -> Iterator[None]:
    if console is None:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("traffic", total=requests or seconds, said="")
        started = time.monotonic()

        def advance() -> None:
            tally = traffic.tally
            failed = tally.wrong + tally.errors
            said = f"{tally.requests:,} requests" + (f", [red]{failed:,} failed[/]" if failed else "")
            bar.update(task, completed=tally.requests if requests else time.monotonic() - started, said=said)

        timer = asyncio.get_running_loop().create_task(_every(0.2, advance))
        try:
            yield
        finally:
            timer.cancel()
            advance()


async def _every(seconds: float, function: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        function()
