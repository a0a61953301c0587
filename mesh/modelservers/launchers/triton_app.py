"""Starts Triton from its settings: `python triton_app.py SETTINGS.json`, in Triton's own environment.

The server is in the wheel of nvidia-pytriton. Its Python backend runs each model in a process of a program, the stub,
which embeds Python. The stub ignores Python's variables, but finds the environment's packages if the environment's
`python3` is the first in PATH. This process becomes the server, so it has one process id.
"""

import contextlib
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

STUB = "triton_python_backend_stub"
_SHARED = Path("/dev/shm")
_PREFIX = "mesh-triton-"


def backends(packages: Path, folder: Path) -> Path:
    """Makes a folder of backends, with the stub of this version of Python, and returns it."""
    server = packages / "pytriton" / "tritonserver"
    made = folder / "backends"
    (made / "python").mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = made / "python" / STUB
    stub.unlink(missing_ok=True)
    # A copy: the stub finds the backend's Python files beside itself.
    stub.write_bytes((server / "python_backend_stubs" / version / STUB).read_bytes())
    stub.chmod(0o755)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        link = made / "python" / name
        link.unlink(missing_ok=True)
        link.symlink_to(server / "backends" / "python" / name)
    return made


def clean(owner: int) -> None:
    """Removes the shared memory that killed servers have left. Its names contain the process id of the server's agent;
    only that of `owner`, and of agents that have ended, is removed."""
    for left in _SHARED.glob(f"{_PREFIX}*"):
        agent = left.name.removeprefix(_PREFIX).partition("-")[0]
        if not agent.isdecimal() or (int(agent) != owner and Path(f"/proc/{agent}").exists()):
            continue
        with contextlib.suppress(OSError):
            left.unlink()


def arguments(given: dict[str, Any], made: Path) -> list[str]:
    """Returns the server's options."""
    return [
        f"--model-repository={given['models']}",
        f"--backend-directory={made}",
        "--model-control-mode=explicit",
        "--allow-http=false",
        f"--grpc-address={given['host']}",
        f"--grpc-port={given['port']}",
        f"--metrics-address={given['host']}",
        f"--metrics-port={given['metrics_port']}",
        "--metrics-interval-ms=500",
        "--allow-cpu-metrics=false",
        "--exit-timeout-secs=5",
        f"--backend-config=python,shm-region-prefix-name={_PREFIX}{given['owner']}-",
        f"--model-load-thread-count={given['load_threads']}",
    ]


def main() -> None:
    """Replaces this process with the server."""
    given = json.loads(Path(sys.argv[1]).read_text())
    packages = Path(sysconfig.get_path("purelib"))
    clean(given["owner"])
    made = backends(packages, Path(given["folder"]))
    libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    if former := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(former)
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(str(one) for one in libraries if one),
    }
    program = packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    os.execve(program, [str(program), *arguments(given, made)], env)


if __name__ == "__main__":
    main()
