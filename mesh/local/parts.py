"""The command line of each part of a local mesh, and its readiness check.

Ports that no client needs to know are chosen at each start of a part, so that a port taken meanwhile does not prevent a
restart. etcd keeps its port, because the other parts know it.
"""

import json
from pathlib import Path

import aiohttp

from mesh.etcdserver.single import etcd_argv
from mesh.local.child import Part
from mesh.local.settings import LOOPBACK, UpSettings, default_capacity, reachable
from mesh.process import free_port, python

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
KILL_AFTER = 10.0
"""Seconds that a part may take to end after its own drain."""


def etcd(settings: UpSettings, *, binary: str, port: int, session: aiohttp.ClientSession) -> Part:
    """Returns the part that runs etcd, on the port that the other parts know."""

    def argv() -> list[str]:
        return etcd_argv(binary, settings.data_dir / "etcd", port, free_port())

    async def ready() -> str:
        return await _healthy(session, f"http://{LOOPBACK}:{port}/health")

    async def answers() -> bool:
        # /health would wait for the disk, but the question is only whether etcd answers at all.
        return await _answers(session, f"http://{LOOPBACK}:{port}/version")

    return Part("etcd", argv, ready, KILL_AFTER, answers, settings.start_timeout)


class LocalPod:
    """A runtime pod. Its ports are chosen at each start. The first pods run Mesh's ONNX server, the next pods the
    servers that Mesh has installed, and the last pods those of --server-command."""

    def __init__(self, settings: UpSettings, number: int, *, etcd_url: str, session: aiohttp.ClientSession) -> None:
        self.name = f"pod-{number}"
        own = settings.own_pods
        self._server = settings.servers[number - own - 1] if number > own else None
        self._adapter = settings.adapted[number - settings.pods - 1] if settings.pods < number <= own else ""
        self.capacity = settings.capacity or default_capacity(own)
        self._settings = settings
        self._etcd_url = etcd_url
        self._session = session
        self._probe = ""

    def part(self) -> Part:
        """Returns the part that runs this pod."""
        settings = self._settings
        grace = settings.drain_timeout + KILL_AFTER
        return Part(self.name, self.argv, self.ready, grace, start_timeout=settings.start_timeout)

    def argv(self) -> list[str]:
        """Chooses ports, and returns the pod's command line with them."""
        settings = self._settings
        self._probe = f"{LOOPBACK}:{free_port()}"
        argv = python("mesh.runtime", "--name", self.name, *_common(settings, self._etcd_url))
        argv += ["--data", f"{LOOPBACK}:{free_port()}", "--control", f"{LOOPBACK}:{free_port()}"]
        argv += ["--probe", self._probe, "--device", settings.device]
        if self._server is None or settings.capacity:
            argv += ["--capacity", str(self.capacity)]
        if self._server is not None:
            # grpc.aio, because another Envoy would take more memory than most servers that are tried here.
            argv += ["--server-command", self._server.command, "--types", self._server.types, "--egress", "grpc"]
        if self._adapter:
            argv += ["--adapter", self._adapter, "--egress", "grpc"]
            argv += ["--allow-code"] if settings.allow_code else []
        argv += ["--model-dir", str(settings.data_dir / self.name), "--lease-ttl", str(settings.lease_ttl)]
        argv += ["--drain-timeout", f"{settings.drain_timeout:g}", "--eviction", settings.eviction]
        for root in dict.fromkeys([settings.samples_dir, *settings.file_roots]):
            argv += ["--file-root", str(root)]
        if settings.threads:
            argv += ["--threads", str(settings.threads)]
        if settings.http_allow_private:
            argv.append("--http-allow-private")
        for option, value in (
            ("--storage-config", settings.storage_config),
            ("--storage-ca", settings.storage_ca),
            ("--pvc-root", settings.pvc_root),
            ("--disk-budget", settings.disk_budget),
        ):
            if value is not None:
                argv += [option, str(value)]
        return [*argv, *settings.runtime_limits]

    async def ready(self) -> str:
        """Returns the reason why the pod is not ready, from its probe, or "" if the pod is ready."""
        return await _probed(self._session, f"http://{self._probe}/ready")


def router(settings: UpSettings, *, etcd_url: str, run_dir: Path, session: aiohttp.ClientSession) -> Part:
    """Returns the part that runs the router. The part is ready once it answers clients and has found every runtime
    pod."""

    def argv() -> list[str]:
        argv = python("router", "--name", "router-1", *_common(settings, etcd_url))
        argv += ["--listen", settings.listen, "--edge", settings.edge, "--rest-listen", settings.rest_listen]
        argv += ["--probe", settings.probe, "--workers", settings.workers, "--run-dir", str(run_dir)]
        if settings.auth != "off":
            settings.admin_key()
            argv += ["--auth", settings.auth, "--admin-key-file", str(settings.admin_key_file)]
        return [*argv, *settings.router_limits]

    async def ready() -> str:
        missing = await _probed(session, f"http://{reachable(settings.probe)}/ready")
        return missing or await _sees_pods(session, settings)

    grace = settings.drain_timeout + 2 * KILL_AFTER
    return Part("router", argv, ready, grace, start_timeout=settings.start_timeout)


def _common(settings: UpSettings, etcd_url: str) -> list[str]:
    return ["--base", settings.base, "--etcd", etcd_url, "--log-format", "json", "--log-level", settings.log_level]


async def _sees_pods(session: aiohttp.ClientSession, settings: UpSettings) -> str:
    url = f"http://{settings.rest_address}/mesh/v1/pods"
    try:
        headers = {"authorization": f"Bearer {key}"} if (key := settings.admin_key()) else {}
        async with session.get(url, headers=headers, timeout=PROBE_TIMEOUT) as response:
            pods = json.loads(await response.read())["pods"]
            ready = [pod["pod"] for pod in pods if pod.get("state") == "ready" and not pod.get("suspect")]
    except (aiohttp.ClientError, OSError) as error:
        return _silent(url, error)
    except (ValueError, KeyError, TypeError):
        return f"{url} answers without a list of pods (HTTP status {response.status})"
    return "" if len(ready) >= settings.all_pods else f"it sees {len(ready)} of {settings.all_pods} runtime pods"


def _silent(url: str, error: Exception) -> str:
    why = f"no answer within {PROBE_TIMEOUT.total:g} s" if isinstance(error, TimeoutError) else str(error)
    return f"{url} does not answer{why and ': '}{why}"


async def _probed(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT) as response:
            return "" if response.ok else (await response.text(errors="replace")).strip() or f"HTTP {response.status}"
    except (aiohttp.ClientError, OSError) as error:
        return _silent(url, error)


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT) as response:
            await response.read()
    except (aiohttp.ClientError, OSError):
        return False
    return True


async def _healthy(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url, timeout=PROBE_TIMEOUT) as response:
            body = await response.text(errors="replace")
    except (aiohttp.ClientError, OSError) as error:
        return _silent(url, error)
    return "" if '"health":"true"' in body.replace(" ", "") else body.strip()
