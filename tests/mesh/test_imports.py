"""The imports of processes at their start, while callers wait for pods, and the names of gRPC options."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from grpc._cython import cygrpc

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "module", ["mesh.runtime.__main__", "mesh.runtime.server.process", "router.process.pod", "router.process.worker"]
)
def test_what_only_logs_does_not_import_rich(module: str) -> None:
    """Processes that only write logs do not import rich, which draws the command line's tables. It would add a tenth to
    their start time, and 4.7 MB."""
    program = f"import sys, {module}; sys.exit('imported' if 'rich' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        # This process becomes etcd, and stays small until then.
        "mesh.etcdserver.member",
        "mesh.process",
    ],
)
def test_what_only_starts_processes_imports_neither_grpc_nor_aiohttp(module: str) -> None:
    program = f"import sys, {module}; sys.exit(str({{'grpc', 'aiohttp', 'google.protobuf'}} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_every_option_of_grpc_that_we_set_is_one_that_it_has() -> None:
    """Every gRPC option that Mesh sets exists. gRPC silently ignores unknown names, and a wrong name once made loads
    fail with "Too many pings"."""
    library = Path(cygrpc.__file__).read_bytes()
    named = {
        name
        for package in ("mesh", "router")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r'\("(grpc\.[a-z0-9_.]+)"', path.read_text())
    }
    assert "grpc.http2.min_ping_interval_without_data_ms" in named, "the scan finds names of options"
    assert not [name for name in sorted(named) if name.encode() not in library]
