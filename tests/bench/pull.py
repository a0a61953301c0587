"""A pull of 1 GiB from a local S3 server by Mesh's puller, by boto3's `download_file` and by plain obstore: MB/s, CPU
and memory."""

import asyncio
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support import programs
from tests.support.stores import Versity

SIZE = 1 << 30
ROUNDS = 3
BUCKET, KEY = "bench", "large.bin"


async def run(folder: Path, console: Console) -> None:
    """Measures the clients alternately, each in a separate process, in several rounds, and prints medians."""
    if why := programs.VERSITYGW.missing():
        console.print(f"[yellow]SKIPPED: the puller is not measured: {why}")
        return
    server = Versity(folder)
    try:
        await server.make(BUCKET)
        path = folder / "buckets" / BUCKET / KEY
        await asyncio.to_thread(_fill, path)
        settings = folder / "settings.json"
        settings.write_text(json.dumps(server.settings(BUCKET)))
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                found[way].append(await _measure(way, settings, folder))
    finally:
        server.stop()
    table = Table(title=f"1 GiB from versitygw over loopback, to disk; medians of {ROUNDS}")
    for heading in ("what", "MB/s", "client CPU s", "resident MB", "MB/s over boto3's"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for way, rounds in found.items():
        rate, cpu, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [own[0] / theirs[0] for own, theirs in zip(rounds, found["boto3 download_file"], strict=True)]
        table.add_row(way, f"{rate:,.0f}", f"{cpu:.2f}", f"{memory:.0f}", f"{statistics.median(ratios):.2f}")
    console.print(table)


def _fill(path: Path) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(block)


async def _measure(way: str, settings: Path, folder: Path) -> tuple[float, float, float]:
    target = folder / "target"
    target.mkdir()
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.pull", way, str(settings), str(target)),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(child.communicate(), 300)
        if child.returncode:
            raise RuntimeError(f"{way} failed")
        rate, cpu, memory = map(float, output.split())
        return rate, cpu, memory
    finally:
        shutil.rmtree(target)


# -- in a separate process


async def _ours(settings: dict[str, str], target: Path) -> Path:
    from puller.puller import Puller
    from puller.source import Source

    secrets = target / "secrets"
    secrets.mkdir()
    (secrets / "default").write_text(json.dumps(settings))
    puller = Puller(directory=target / "models", secrets=secrets)
    puller.sweep()
    pulled = await puller.pull(Source(KEY, '{"storage_key": "default"}'), into="m")
    _unfinished.append(puller.close())  # files become safe on disk after the measured load
    return pulled.path


async def _boto3(settings: dict[str, str], target: Path) -> Path:
    import boto3

    client: Any = boto3.client(
        "s3",
        endpoint_url=settings["endpoint_url"],
        aws_access_key_id=settings["access_key_id"],
        aws_secret_access_key=settings["secret_access_key"],
        region_name=settings["region"],
    )
    await asyncio.to_thread(client.download_file, BUCKET, KEY, str(target / "file"))
    return target / "file"


async def _obstore(settings: dict[str, str], target: Path) -> Path:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        config={"endpoint": settings["endpoint_url"], "region": settings["region"]},
        access_key_id=settings["access_key_id"],
        secret_access_key=settings["secret_access_key"],
        client_options={"allow_http": True, "timeout": "10m"},
    )
    with (target / "file").open("wb") as file:
        async for chunk in (await obstore.get_async(store, KEY)).stream(min_chunk_size=4 << 20):
            file.write(chunk)
    return target / "file"


WAYS: dict[str, Callable[[dict[str, str], Path], Awaitable[Path]]] = {
    "the puller": _ours,
    "boto3 download_file": _boto3,
    "obstore, one stream": _obstore,
}
_unfinished: list[Awaitable[None]] = []


async def _main(way: str, settings: Path, target: Path) -> None:
    said = json.loads(settings.read_text())
    before = time.process_time()
    began = time.perf_counter()
    path = await WAYS[way](said, target)
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    if path.stat().st_size != SIZE:
        raise RuntimeError(f"{path.stat().st_size} bytes came")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(SIZE / 1e6 / seconds, cpu, memory, flush=True)
    for closing in _unfinished:
        await closing


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
