"""`make bench`: measures a mesh of real processes on this machine and prints ratios; asserts nothing.

    python -m tests.bench [chain] [large] [coldstart] [storm] [registry] [pull] [tls] [memory]

Absolute times depend on the machine: compare the ratios, which are taken in one run.
"""

import asyncio
import os
import platform
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.bench import chain, coldstart, footprint, large, pull, registry, storm, tls
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh

PARTS = ("chain", "large", "coldstart", "storm", "registry", "pull", "tls", "memory")

_OF_THEIR_OWN = {"storm": storm, "tls": tls, "memory": footprint}
"""Parts that make meshes of their own."""


async def main() -> None:
    """Runs the named parts, or all."""
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores, Python {platform.python_version()}, every process and the load on them")
    for part in wanted:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "pull":
                await pull.run(folder, console)
                continue
            async with EtcdServer(folder / "etcd") as etcd:
                if part in _OF_THEIR_OWN:
                    await _OF_THEIR_OWN[part].run(etcd, folder, console)
                    continue
                async with LocalMesh(folder, etcd, pods=1, capacity="256MiB", log_level="info") as mesh:
                    match part:
                        case "chain":
                            await chain.run(mesh, folder, console)
                        case "large":
                            await large.run(mesh, folder, console)
                        case "coldstart":
                            await coldstart.run(mesh, console)
                        case "registry":
                            await registry.run(mesh, console)


if __name__ == "__main__":
    asyncio.run(main())
