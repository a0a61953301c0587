"""Load for measuring calls a second: h2load (gRPC) and wrk (REST), which cost less CPU than the servers they measure.

If one is missing, `client` takes its place. It costs more CPU than the servers, so calls a second are then too low for
all servers. The output names the generators, and marks each figure that a generator's own CPU limits. `client` always
sends large messages, because h2load takes 40 ms to upload 4 MB, longer than the servers take to answer.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.bench.client import Order, Outcome, call
from tests.bench.door import Door
from tests.bench.h2load import counted

BOUND = 0.9
"""Share of one core above which a generator with one thread limits the result."""

_LARGE = 64 * 1024  # bytes of a request


def named(door: Door) -> str:
    if len(door.body) <= _LARGE:
        if door.kind == "grpc" and shutil.which("h2load"):
            return "h2load"
        if door.kind == "rest" and shutil.which("wrk"):
            return "wrk"
    return "grpcio" if door.kind == "grpc" else "http.client"


def throughput(door: Door, *, seconds: float, callers: int) -> Outcome:
    """Makes calls for a number of seconds; each caller makes one call at a time. Raises RuntimeError if a call
    fails."""
    match named(door):
        case "h2load":
            return _h2load(door, seconds, callers)
        case "wrk":
            return _wrk(door, seconds, callers)
    return call(Order(door, seconds, callers))


def _run(argv: list[str], seconds: float) -> tuple[str, float, float]:
    """Runs a generator. Returns its output, its duration in seconds, and its CPU seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if child.returncode:
        raise RuntimeError(f"{argv[0]} ended with {child.returncode}: {text[-2000:]}")
    return text, time.perf_counter() - began, used.ru_utime + used.ru_stime


def _h2load(door: Door, seconds: float, callers: int) -> Outcome:
    """Makes calls over up to 8 connections, on which each caller is a stream."""
    connections = min(callers, 8)
    with tempfile.NamedTemporaryFile() as body:
        body.write(door.framed)
        body.flush()
        argv = ["h2load", "-D", f"{seconds:.0f}", "-t", "1", "-c", str(connections), "-m", str(callers // connections)]
        argv += ["-d", body.name, "-H", "content-type: application/grpc", "-H", "te: trailers"]
        for name, value in door.headers.items():
            argv += ["-H", f"{name}: {value}"]
        text, took, cpu = _run([*argv, door.url], seconds)
    calls, rate = counted(text, door.answer)
    return Outcome(calls, calls / rate, cpu * (calls / rate) / took)


_LUA = """
wrk.method = "POST"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
{headers}
"""


def _wrk(door: Door, seconds: float, callers: int) -> Outcome:
    """Makes calls with one connection for each caller."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "body").write_bytes(door.body)
        headers = "\n".join(f'wrk.headers["{key}"] = "{value}"' for key, value in door.headers.items())
        (folder / "post.lua").write_text(_LUA.format(body=folder / "body", headers=headers))
        argv = ["wrk", "-t", "1", "-c", str(callers), "-d", f"{seconds:.0f}s", "--timeout", "30s"]
        text, took, cpu = _run([*argv, "-s", str(folder / "post.lua"), door.url], seconds)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    done = re.search(r"(\d+) requests in", text)
    if rate is None or done is None or not float(rate[1]) or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"wrk: {text[-2000:]}")
    elapsed = int(done[1]) / float(rate[1])
    return Outcome(int(done[1]), elapsed, cpu * elapsed / took)
