"""Measurements of a mesh of real processes on this machine, compared with other servers (`make bench`). No figure makes
a run fail.

    python -m tests.bench [PART...]      some parts; without arguments, those of DEFAULT; `all`: all of them

Absolute times depend on the machine, so compare the ratios, which are taken within one run. The results of the parts
that compare systems are also written to a JSON file. `make performance` writes docs/performance.md from the file of a
complete run.
"""

import argparse
import asyncio
import os
import platform
import tempfile
from pathlib import Path

from rich.console import Console

from tests.bench import alias, auth, chain, coldstart, direct, footprint, large, pull, registry, relay, storm, tls
from tests.bench.peers import comparison
from tests.bench.plan import QUICK, Plan
from tests.bench.results import BUSY, Results
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh

PARTS = {
    "chain": "the complete chain compared with a plain grpc.aio server, by process",
    "peers": "the mesh compared with MLServer, KServe and Ray Serve, in environments that it makes (1.5 GB)",
    "large": "tensors of 100 KB and 4 MB compared with a plain server, and the memory that they take",
    "coldstart": "first calls of models that are not loaded",
    "storm": "a hot model during 200 cold loads",
    "registry": "registrations, and the start of a router with many models",
    "pull": "the puller compared with boto3",
    "tls": "the cost of TLS",
    "memory": "the memory of small models",
    "servers": "MLServer and Triton called directly compared with calls through the mesh",
    "relay": "the relay to a foreign server, with each egress, compared with an Envoy alone",
    "auth": "calls with a key and with a token compared with calls of an open mesh, and the cost of a decision",
    "alias": "calls by alias compared with calls by id, with shadows, and the share of a canary",
}

DEFAULT = ("chain", "peers", "large", "servers")
"""The parts that docs/performance.md shows."""

_OF_THEIR_OWN = {"storm": storm, "tls": tls, "memory": footprint, "alias": alias, "auth": auth, "relay": relay}
"""The parts that start their own meshes, and only print their figures."""

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "bench"


def output(names: list[str], *, quick: bool) -> Path:
    """Returns the file for the results of a run of these parts. A run of only some parts, or a quick run, does not
    overwrite the results of a complete run, because docs/performance.md is written from those."""
    if set(names) >= set(DEFAULT) and not quick:
        return FOLDER / "results.json"
    return FOLDER / f"results-{'-'.join(names)}{'-quick' if quick else ''}.json"


async def main(wanted: list[str], results: Results, plan: Plan) -> None:
    console = results.console
    for part in wanted:
        with tempfile.TemporaryDirectory(prefix="mesh-") as name:
            folder = Path(name)
            if part == "pull":
                await pull.run(folder, console)
                continue
            async with EtcdServer(folder / "etcd") as etcd:
                if part in _OF_THEIR_OWN:
                    await _OF_THEIR_OWN[part].run(etcd, folder, console)
                    continue
                if part == "servers":
                    await direct.run(etcd, folder, results, plan)
                    continue
                async with LocalMesh(folder, etcd, pods=1, capacity="256MiB", log_level="info") as mesh:
                    match part:
                        case "chain":
                            await chain.run(mesh, folder, results, plan.chain)
                        case "peers":
                            await comparison.run(mesh, folder, results, plan)
                        case "large":
                            await large.run(mesh, folder, results, plan.large)
                        case "coldstart":
                            await coldstart.run(mesh, console)
                        case "registry":
                            await registry.run(mesh, console)


if __name__ == "__main__":
    parts = "\n".join(f"  {name:10} {text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures a mesh on this machine and compares it with other servers.",
        epilog=f"parts:\n{parts}\n\nwithout any: {' '.join(DEFAULT)} (17 minutes, and a few more to install the peers)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="Part to run, or all.")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file for the results. Default: .cache/bench/results.json for all parts of docs/performance.md, and "
        "results-PART.json beside it for others.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="Take one short round of each part, only to see that everything works."
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - {*PARTS, "all"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}, all")
    console = Console(width=None if os.isatty(1) else 130)
    console.print(f"{os.cpu_count()} cores, Python {platform.python_version()}, every process and the load on them")
    results = Results(console)
    if (busy := results.machine["busy"]) > BUSY:
        text = f"{busy * (os.cpu_count() or 1):.1f} other tasks run now: latencies will say little"
        console.print(f"[bold yellow]this machine is not quiet: {text}")
    names = list(PARTS) if "all" in chosen.parts else chosen.parts or list(DEFAULT)
    asyncio.run(main(names, results, QUICK if chosen.quick else Plan()))
    path = chosen.output or output(names, quick=chosen.quick)
    if not results.comparisons:
        console.print("these parts only print their figures: no file was written")
    else:
        results.write(path)
        more = "" if chosen.quick else f"; to write docs/performance.md from them: make performance ARGS={path}"
        console.print(f"results: {path}{more}")
