"""A mesh installed on the test cluster, models for it, and traffic from outside whose answers are all verified.

Resource requests are small, because the node has two cores and other work. Limits and all other values are the chart's
defaults.
"""

import asyncio
import base64
import contextlib
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from deploy import manifests
from tests.support import documented, models
from tests.support.cluster import ROOT, Kube, pod, ready_at
from tests.support.localmesh import Client
from tests.support.waiting import until

READY = 90.0
"""Seconds that an installation with its images present may take to become ready."""

NAME = "127.0.0.1"
"""The name in the endpoint's certificate: the local end of a forwarded port."""

ONE = np.ones((1, 1), np.float32)


def values(image: str, *, storage: str = "") -> dict[str, Any]:
    """Returns values for two routers, a pool of three, a second pool with a label, and one member of etcd, with a
    volume of the given storage class or without one."""
    registry, _, rest = image.partition("/")
    repository, _, tag = rest.partition(":")

    def resources(memory: str) -> dict[str, Any]:
        return {"requests": {"cpu": "20m", "memory": memory}, "limits": {"cpu": "2", "memory": memory}}

    return {
        "image": {"registry": registry, "repository": repository, "tag": tag, "pullPolicy": "Never"},
        "router": {"resources": resources("512Mi")},
        "runtime": {"resources": resources("512Mi"), "disk": {"size": "1Gi"}},
        "pools": [{"name": "cpu", "replicas": 3}, {"name": "big", "replicas": 1, "labels": ["big"]}],
        "storage": {"allowPrivate": True},
        "etcd": {
            "members": 1,
            "resources": resources("256Mi"),
            "storage": {"kind": "volume", "size": "1Gi", "storageClassName": storage}
            if storage
            else {"kind": "emptyDir", "size": "1Gi"},
            "snapshots": {"enabled": False},
        },
    }


def laid_over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values merged as Helm merges several files, later ones over earlier ones."""
    found = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = laid_over(found[key], value) if both else value
    return found


class Installed:
    """A mesh that Helm has installed in a namespace, and that the namespace's admin uses."""

    def __init__(self, kube: Kube, image: str, *, storage: str = "") -> None:
        self.kube = kube
        self.image = image
        self.values = values(image, storage=storage)
        self.models: dict[str, float] = {}
        self.trust: Path | None = None  # the trusted authority, as `NAME`, if the endpoint speaks TLS
        self.management = 8008  # the Service's port for `mesh`

    # --- helm ---

    def helm(self, *argv: str, over: Mapping[str, Any] | None = None) -> str:
        """Runs `helm install`, `helm upgrade` or a similar command with the usual values, overridden by the given
        ones."""
        with self.values_file(over) as file:
            return self.kube.helm(*argv, str(manifests.CHART), f"--values={file}", timeout=120.0)

    @contextlib.contextmanager
    def values_file(self, over: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Writes a values file for Helm, the usual values overridden by the given ones. The file exists while the block
        is open."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(laid_over(self.values, over or {}), file)
            file.flush()
            yield Path(file.name)

    # --- the docs ---

    def typed(self, heading: str, *about: str, words: Mapping[str, str] | None = None, folder: Path = ROOT) -> str:
        """Runs the commands below a heading of docs/kubernetes.md, either all commands or those that contain one of the
        texts in `about`, with placeholders replaced. Returns their output."""
        block = documented.block("kubernetes.md", heading)
        chosen = [command for command in block if not about or any(word in command.text for word in about)]
        assert chosen, f"nothing about {about} below {heading!r}"
        put = {"team-a": self.kube.namespace, **(words or {})}
        return "".join(self.kube.shell(command.put(put), folder=folder) for command in chosen)

    async def ready(self, timeout: float = READY) -> None:
        """Waits until all pods are up to date and ready, and no old pod is left."""
        await self.kube.until(self._is_ready, "the mesh is ready", timeout=timeout)

    def _is_ready(self) -> bool:
        for one in self.kube.get("deployments,statefulsets", "--selector=app.kubernetes.io/name=mesh")["items"]:
            state, wanted = one["status"], one["spec"]["replicas"]
            if state.get("observedGeneration") != one["metadata"]["generation"]:
                return False
            if any(state.get(name, 0) != wanted for name in ("replicas", "readyReplicas", "updatedReplicas")):
                return False
        pods = self.pods()
        return bool(pods) and not any("deletionTimestamp" in one["metadata"] for one in pods)

    # --- what is there ---

    def pods(self, component: str = "", pool: str = "") -> list[dict[str, Any]]:
        """Returns the pods of the mesh, or of one component or pool."""
        selector = "app.kubernetes.io/name=mesh"
        selector += f",app.kubernetes.io/component={component}" if component else ""
        selector += f",mesh/pool={pool}" if pool else ""
        found: list[dict[str, Any]] = self.kube.get("pods", f"--selector={selector}")["items"]
        return found

    def names(self, component: str = "", pool: str = "") -> list[str]:
        return [one["metadata"]["name"] for one in self.pods(component, pool)]

    def left(self) -> list[str]:
        """Returns the objects in the namespace that neither Kubernetes nor a test has created."""
        kinds = "deployments,statefulsets,replicasets,daemonsets,jobs,cronjobs,pods,services,endpointslices,configmaps"
        kinds += ",secrets,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets"
        kinds += ",persistentvolumeclaims,horizontalpodautoscalers,leases"
        theirs = {"store", "kube-root-ca.crt", "owner", "default"}
        return [
            f"{one['kind']}/{name}"
            for one in self.kube.get(kinds)["items"]
            if (name := one["metadata"]["name"]) not in theirs and not name.startswith("store-")
        ]

    @property
    def address(self) -> str:
        """The address of the Service, which this machine reaches because it is the cluster's only node."""
        return str(self.kube.get("service", "modelmesh-serving")["spec"]["clusterIP"])

    def channel(self) -> grpc.aio.Channel:
        address = f"{self.address}:8033"
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.trust is None:
            return grpc.aio.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(self.trust.read_bytes())
        return grpc.aio.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", NAME)])

    async def mesh(self, *argv: str, given: str = "", codes: Collection[int] = (0,)) -> str:
        """Runs the `mesh` command as a user outside the cluster does, through a forwarded port and with the admin's
        key, and returns its output. Its exit status must be one of `codes`."""
        async with self.kube.forward("service/modelmesh-serving", self.management) as port:
            where = ["--endpoint", f"{'https' if self.trust else 'http'}://{NAME}:{port}"]
            trust = ["--ca", str(self.trust)] if self.trust else []
            child = await asyncio.create_subprocess_exec(
                *(str(Path(sys.executable).with_name("mesh")), *trust, *argv, *where),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **self.kube.environment, **self.credentials()},
            )
            try:
                async with asyncio.timeout(60.0):
                    out, err = await child.communicate(given.encode())
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()
        assert child.returncode in codes, f"mesh {' '.join(argv)}: {err.decode()}{out.decode()}\n{self.kube.story()}"
        return out.decode()

    def credentials(self) -> dict[str, str]:
        """Returns the variable with the admin's key for `mesh`, or nothing if the mesh has no such key."""
        secrets = {one["metadata"]["name"]: one for one in self.kube.get("secrets")["items"]}
        data = secrets.get("mesh-admin-key", {}).get("data", {})
        return {"MESH_API_KEY": base64.b64decode(data["admin.key"]).decode()} if data else {}

    def metric(self, pod: str, name: str, *, port: int = 8089) -> float:
        """Returns the value of a metric without labels, as a pod reports it."""
        address = self.kube.get("pod", pod)["status"]["podIP"]
        with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10.0) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise AssertionError(f"{pod} has no metric {name}")

    # --- models ---

    async def offer(self, count: int) -> None:
        """Puts that many models into a store in the namespace, and registers them from outside."""
        numbers = {f"m{number}": float(number) for number in range(count)}
        self.kube.apply(*_store(self.image, {f"{name}.onnx": models.constant(v) for name, v in numbers.items()}))
        await self.kube.wait("pod/store", "condition=Ready")
        await self.register({name: f"models/{name}.onnx" for name in numbers})
        self.models |= numbers

    async def store(self, name: str, content: bytes) -> None:
        program = "import base64, sys; open(sys.argv[1], 'wb').write(base64.b64decode(sys.stdin.read()))"
        argv = ("exec", "--stdin", "store", "--", "python", "-c", program, f"/files/{name}")
        await asyncio.to_thread(self.kube.kubectl, *argv, given=base64.b64encode(content).decode())

    async def register(self, paths: Mapping[str, str]) -> None:
        """Registers models with files of the store, from outside the cluster."""
        lines = [{"id": name, "path": f"http://store:8000/{path}", "type": "onnx"} for name, path in paths.items()]
        await self.mesh("import", "-", given="\n".join(map(json.dumps, lines)))


def _store(image: str, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Returns the objects of a web server with these files in the folder `models`."""
    server = {
        "name": "it",
        "image": image,
        "command": ["python", "-m", "http.server", "--directory", "/files"],
        "readinessProbe": ready_at("/", 8000),
        "volumeMounts": [
            {"name": "files", "mountPath": "/files"},
            {"name": "models", "mountPath": "/files/models"},
        ],
    }
    volumes = [{"name": "files", "emptyDir": {}}, {"name": "models", "configMap": {"name": "store"}}]
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "store"},
            "binaryData": {name: base64.b64encode(content).decode() for name, content in files.items()},
        },
        pod("store", server, volumes=volumes),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "store"},
            "spec": {"selector": {"app": "store"}, "ports": [{"port": 8000}]},
        },
    ]


class Traffic:
    """Callers of all models of a mesh, each with a separate connection. Every answer is verified.

    A call that fails with UNAVAILABLE is retried once, as gRPC clients should.
    """

    def __init__(self, mesh: Installed, *, callers: int = 4, pause: float = 0.03) -> None:
        self._mesh = mesh
        self._models = mesh.models
        self._callers = callers
        self._pause = pause
        self._ended = False
        self.calls = self.again = 0
        self.errors: list[str] = []

    async def __aenter__(self) -> "Traffic":
        self._tasks = [asyncio.ensure_future(self._run(number)) for number in range(self._callers)]
        await self.some()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.gather(*self._tasks)

    def caller(self, channel: grpc.aio.Channel) -> Callable[[str, bool], Awaitable[str]]:
        """Returns a function that calls a model, with or without `wait_for_ready`, and returns what is wrong with the
        answer."""
        client = Client(channel)

        async def call(name: str, wait: bool) -> str:
            (answer,) = await client.infer(name, wait_for_ready=wait, x=ONE)
            wanted = self._models[name]
            return "" if answer.item() == wanted else f"{answer.item()} instead of {wanted}"

        return call

    async def _run(self, number: int) -> None:
        names = list(self._models)
        async with self._mesh.channel() as channel:
            call = self.caller(channel)
            while not self._ended:
                number = (number + 7) % len(names)
                await self._call(call, names[number])
                await asyncio.sleep(self._pause)

    async def _call(self, call: Callable[[str, bool], Awaitable[str]], name: str) -> None:
        for attempt in (1, 2):
            try:
                wrong = await call(name, attempt == 2)
                break
            except grpc.aio.AioRpcError as error:
                if attempt == 2 or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.errors.append(f"{name}: {error.code().name}: {error.details()}")
                    return
                self.again += 1
        if wrong:
            self.errors.append(f"{name}: {wrong}")
        self.calls += 1

    async def some(self, calls: int = 0) -> None:
        """Waits until that many more calls are answered, by default as many as there are models."""
        end = self.calls + (calls or len(self._models))
        await until(lambda: self.calls >= end, timeout=120.0, why=lambda: f"calls are answered: {self.errors[-3:]}")
