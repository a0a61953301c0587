"""The cost of authentication: calls with a key and with a token, compared with calls of an open mesh.

Two meshes that differ only in `--auth` are called in turn, in short rounds, so that other load on the machine affects
all alike. The token is also sent to the open mesh, which does not read it: this shows what carrying the token costs.

The parts inside a worker are measured in this process too, where a difference of less than a microsecond is not lost.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.access.grants import Grants, decide, grant
from mesh.access.principals import Principal
from mesh.access.verbs import Verb
from tests.bench.load import Metadata, generator, throughput
from tests.bench.processes import Meter, exact_seconds
from tests.support import models
from tests.support.access import guard_of
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh, children, command, infer_request
from tests.support.tokens import AUDIENCE, FakeIssuer, known_tokens

CALLS, ROUNDS = 1_024, 40

MODEL = "fraud"

_ADMIN = "a" * 40
_TURNS, _EACH = 40, 2_000  # measurements in this process, and calls of each: the fastest counts


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures many short rounds, and prints medians and differences."""
    _inside(console)
    issuer = FakeIssuer(algorithm="RS256")
    (folder / "jwks.json").write_bytes(issuer.jwks)
    (folder / "admin.key").write_text(_ADMIN)
    asked = ["--auth", "required", "--admin-key-file", str(folder / "admin.key"), "--audit", "off"]
    asked += ["--auth-jwt-issuer", issuer.url, "--auth-jwt-audience", AUDIENCE]
    asked += ["--auth-jwt-keys", str(folder / "jwks.json")]
    options = {"pods": 1, "capacity": "256MiB", "log_level": "info"}
    async with (
        LocalMesh(folder / "open", etcd, **options) as opened,
        LocalMesh(folder / "asking", etcd, router_options=asked, key=_ADMIN, **options) as asking,
    ):
        for mesh in (opened, asking):
            path = mesh.write(f"{MODEL}.onnx", models.logistic_regression(0, features=64))
            body = {"type": "onnx", "path": path.as_uri(), "load": True, "sync": True}
            assert (await mesh.rest("PUT", f"/mesh/v1/models/{MODEL}", body)).status == 201
        key = (await asking.rest("PUT", "/mesh/v1/keys/bench", {"role": "infer", "models": [MODEL]})).json["key"]
        given = {"role": "infer", "models": [MODEL], "to": ["user:anna"]}
        assert (await asking.rest("PUT", "/mesh/v1/grants/anna", given)).status == 201
        token = issuer.token("anna", groups=[f"group-{number}" for number in range(10)])
        await _calls(opened, asking, key, token, folder, console)


async def _calls(opened: LocalMesh, asking: LocalMesh, key: str, token: str, folder: Path, console: Console) -> None:
    """Compares the ways of calling, by calls per second and by the CPU of all processes."""
    features = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    message = infer_request(MODEL, **{models.LOGISTIC_REGRESSION_INPUT: features}).SerializeToString()
    ways: dict[str, tuple[LocalMesh, Metadata]] = {
        "open": (opened, ()),
        "open, token unread": (opened, [("authorization", f"Bearer {token}")]),
        "key": (asking, [("authorization", f"Bearer {key}")]),
        "token": (asking, [("authorization", f"Bearer {token}")]),
    }
    tiers = {way: _tiers(mesh) for way, (mesh, _) in ways.items()}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    spent: dict[str, dict[str, list[float]]] = {way: {tier: [] for tier in tiers[way]} for way in ways}
    for turn in range(ROUNDS + 1):
        for way in sorted(ways, reverse=bool(turn % 2)):
            mesh, metadata = ways[way]
            meter = Meter.begin(tiers[way], exact_seconds)
            rate = await throughput(mesh.grpc_address(), message, calls=CALLS, folder=folder, metadata=metadata)
            if not turn:
                continue  # the first round warms up
            rates[way].append(rate)
            for tier, used in meter.spent().items():
                spent[way][tier].append(used / CALLS * 1e6)
    middle = statistics.median
    whole = {way: [sum(each) for each in zip(*parts.values(), strict=True)] for way, parts in spent.items()}
    table = Table(title=f"Who calls: a token of {len(token)} bytes; medians of {ROUNDS} rounds (load: {generator()})")
    table.add_column("what")
    for way in ways:
        table.add_column(way, justify="right")
    table.add_row("calls/s", *(f"{middle(rates[way]):,.0f}" for way in ways))
    table.add_row("CPU a call, us", *(f"{middle(whole[way]):,.1f}" for way in ways))
    for tier in tiers["open"]:
        table.add_row(f"  {tier}", *(f"{middle(spent[way][tier]):,.1f}" for way in ways))
    more = {way: [a - b for a, b in zip(whole[way], whole["open"], strict=True)] for way in ways if way != "open"}
    table.add_row("more than open, us", "", *(_told(values) for values in more.values()))
    table.add_row("reach", "", "", "<= 3", "<= 15")
    console.print(table)


def _told(values: list[float]) -> str:
    """Returns the median with its standard error, as a text. The error assumes a normal distribution."""
    return f"{statistics.median(values):+,.1f} ± {1.25 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def _tiers(mesh: LocalMesh) -> dict[str, list[int]]:
    below = {pid: command(pid) for pid in children(mesh.routers[0].pid)}
    return {
        "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
        "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
        "server": [mesh.server_pid(pod) for pod in mesh.pods],
    }


def _inside(console: Console) -> None:
    """Measures how long a worker takes to recognise a caller and to decide."""
    key = "mesh_" + "k" * 43
    table = Table(title="Inside a worker")
    for heading in ("what", "us", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    def row(what: str, work: Callable[[], object], reach: str = "") -> None:
        table.add_row(what, f"{_fastest(work):.2f}", reach)

    grants = {"g": ("infer", [MODEL], ["key:k", "user:anna"])}
    for algorithm in ("RS256", "ES256", "ES512"):
        issuer = FakeIssuer(algorithm=algorithm)
        token = issuer.token("anna")
        guard = guard_of("required", {"k": key}, grants, others=[known_tokens(issuer)], wall=time.time)
        for what, text in (("a key", key), ("a token", token))[algorithm != "RS256" :]:
            headers = [(b"te", b"trailers"), (b"authorization", b"Bearer " + text.encode()), (b"x-trace", b"1")]
            if algorithm == "RS256":
                row(
                    f"a remembered caller by {what}, and a remembered decision",
                    lambda guard=guard, headers=headers: guard.allow(guard.known(headers), Verb.INFER, MODEL),
                    "< 1",
                )

            def fresh(guard=guard, headers=headers) -> None:
                guard.clear()
                guard.known(headers)

            row(f"a caller by {what} that was not seen before" + f", {algorithm}" * (text is token), fresh)
    many = {f"g{at}": grant("infer", [f"team-{at}/*", "shared/*"], [f"group:{at}", "key:k"]) for at in range(20)}
    found, principal = Grants(many), Principal("key:k")
    row("a decision by the first of 20 grants", lambda: decide(found, principal, Verb.INFER, "team-0/x"))
    row("a denial by 20 grants", lambda: decide(found, principal, Verb.INFER, "other"))
    console.print(table)


def _fastest(work: Callable[[], object]) -> float:
    """Returns the CPU microseconds of one call of `work`, averaged over the fastest of `_TURNS` turns."""
    best = float("inf")
    count, began = 0, time.process_time()
    while time.process_time() - began < 0.05:
        work()
        count += 1
    for _ in range(_TURNS):
        began = time.process_time()
        for _ in range(max(1, min(count, _EACH))):
            work()
        best = min(best, (time.process_time() - began) / max(1, min(count, _EACH)))
    return best * 1e6
