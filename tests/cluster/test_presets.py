"""A pool with the preset `mlserver`: MLServer in a separate container, installed by the chart, rolled out and killed.

The official image cannot be fetched here. The tests make one from this tree's image and from the environment that `mesh
servers install mlserver` has made. The preset's command, variables, ports, probes and user are used unchanged.
"""

import asyncio
import json
import shutil
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from deploy.cluster import images, lifecycle
from mesh.modelservers import environments
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc
from mesh.runtime.cache.evictions import capacity
from tests.support.cluster import Kube
from tests.support.installed import Installed, Traffic

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = 3
LIMIT = 1 << 30
ROWS = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])

TRAIN = """
import json, sys, joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import Ridge
x, y = load_iris(return_X_y=True)
answers = []
for number in range(int(sys.argv[2])):
    model = Ridge(alpha=1.0 + number).fit(x, y + number)
    joblib.dump(model, f"{sys.argv[1]}/{number}.joblib")
    answers.append(model.predict(json.loads(sys.argv[3])).tolist())
print(json.dumps(answers))
"""

UNUSED = (
    "catboost*",
    "xgboost*",
    "lightgbm*",
    "mlflow*",
    "pyarrow*",
    "plotly*",
    "matplotlib*",
    "fontTools*",
    "pillow*",
)
"""Packages that scikit-learn's runtime does not need: half of the environment."""

SPIES = """
import json, os
found = {}
for name in os.listdir("/proc"):
    words = open(f"/proc/{name}/cmdline", "rb").read() if name.isdecimal() else b""
    if b"mesh.runtime" in words and int(name) != os.getpid():
        for what, use in {
            "environ": lambda: open(f"/proc/{name}/environ", "rb").read(),
            "memory": lambda: open(f"/proc/{name}/mem", "rb").read(1),
            "files": lambda: os.listdir(f"/proc/{name}/root/etc/mesh/etcd"),
            "signals": lambda: os.kill(int(name), 0),
        }.items():
            try:
                use()
                found[what] = "possible"
            except PermissionError:
                found.setdefault(what, "refused")
print(json.dumps([os.getuid(), found]))
"""

ENDS = """
import os, signal
for name in os.listdir("/proc"):
    if name.isdecimal() and b"mlserver_app" in open(f"/proc/{name}/cmdline", "rb").read() and int(name) != os.getpid():
        os.kill(int(name), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def environment() -> Path:
    """The folder of MLServer's environment."""
    folder = environments.installed("mlserver")
    if folder is None:
        pytest.skip("SKIPPED, NO PRESET HAS BEEN TESTED: run `mesh servers install mlserver`")
    return folder


@pytest.fixture(scope="module")
def mlserver(image: str, environment: Path) -> str:
    """The name of an image with MLServer."""

    def add(root: Path) -> None:
        (packages,) = environment.glob("lib/python*/site-packages")
        into = root / "opt" / "mlserver" / packages.relative_to(environment)
        unused = {path.name for pattern in UNUSED for path in packages.glob(pattern)}
        skip = lambda folder, names: unused if Path(folder) == packages else ()  # noqa: E731
        shutil.copytree(packages, into, symlinks=True, ignore=skip)
        # An environment of the image's own Python, which has the same version.
        (python,) = root.glob(f"usr/bin/{into.parent.name}")
        (root / "opt" / "mlserver" / "pyvenv.cfg").write_text("home = /usr/bin\n")
        (root / "opt" / "mlserver" / "bin").mkdir()
        (root / "opt" / "mlserver" / "bin" / "python").symlink_to(f"/{python.relative_to(root)}")

    return lifecycle.image_changed(image, f"{images.MESH}-mlserver", add)


@pytest.fixture(scope="module")
def trained(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    """The folder of the trained models, and scikit-learn's own answers to ROWS."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [
        str(environments.python_of(environment)),
        "-I",
        "-c",
        TRAIN,
        str(folder),
        str(MODELS),
        json.dumps(ROWS.tolist()),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


class Predictions(Traffic):
    """Callers of the trained models."""

    answers: dict[str, list[float]]

    def caller(self, channel: grpc.aio.Channel) -> Callable[[str, bool], Awaitable[str]]:
        """Returns a function that calls a model and compares the answer with scikit-learn's."""
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def call(name: str, wait: bool) -> str:
            request = v2.ModelInferRequest(model_name=name)
            tensor = request.inputs.add(name="x", datatype="FP64", shape=ROWS.shape)
            tensor.contents.fp64_contents.extend(ROWS.ravel())
            answer = await stub.ModelInfer(request, timeout=60, wait_for_ready=wait)
            (output,) = answer.outputs
            return "" if np.allclose(output.contents.fp64_contents, self.answers[name]) else str(output)

        return call


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    shared_namespace: Kube, image: str, mlserver: str, trained: tuple[Path, list[list[float]]]
) -> AsyncIterator[Installed]:
    """One router, a pool of one ONNX pod, and a pool of two pods with MLServer."""
    mesh = Installed(shared_namespace, image)

    def resources(mib: int) -> dict[str, Any]:
        return {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": f"{mib}Mi"}}

    mesh.values["router"] |= {"replicas": 1}
    mesh.values["pools"] = [
        {"name": "cpu", "replicas": 1},
        {
            "name": "ml",
            "replicas": 2,
            "preset": "mlserver",
            "allowCode": True,
            "server": {
                "image": mlserver,
                "pullPolicy": "Never",
                "env": [{"name": "PATH", "value": "/opt/mlserver/bin:/usr/bin:/bin"}],
            },
            "resources": resources(LIMIT >> 20),
            "agentResources": resources(512),
        },
    ]
    mesh.helm("install", "mesh")
    await mesh.ready(300.0)
    await mesh.offer(1)
    folder, answers = trained
    names = [f"s{number}" for number in range(MODELS)]
    for number, name in enumerate(names):
        await mesh.store(f"{name}.joblib", (folder / f"{number}.joblib").read_bytes())
    lines = [{"id": name, "path": f"http://store:8000/{name}.joblib", "type": "sklearn"} for name in names]
    await mesh.mesh("import", "-", given="\n".join(map(json.dumps, lines)))
    mesh.models = dict.fromkeys(names, 0.0)
    Predictions.answers = dict(zip(names, answers, strict=True))
    yield mesh


def over_rest(mesh: Installed, name: str) -> list[float]:
    tensor = {"name": "x", "datatype": "FP64", "shape": list(ROWS.shape), "data": ROWS.tolist()}
    request = urllib.request.Request(
        f"http://{mesh.address}:8008/v2/models/{name}/infer", data=json.dumps({"inputs": [tensor]}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        (output,) = json.loads(reply.read())["outputs"]
    return [float(value) for value in np.ravel(output["data"])]


@pytest.mark.timeout(900)
async def test_pickles_are_served_by_the_pool_that_allows_code(mesh: Installed) -> None:
    """scikit-learn models are loaded in the pool with MLServer, and answer as scikit-learn does, over gRPC and REST."""
    async with Predictions(mesh) as traffic:
        await traffic.some()
    assert traffic.errors == []
    pods = set(mesh.names("runtime", "ml"))
    for name in mesh.models:
        status = json.loads(await mesh.mesh("status", name, "--json"))
        assert {copy["pod"] for copy in status["copies"]} <= pods
        assert status["copies"]
        answer = await asyncio.to_thread(over_rest, mesh, name)
        assert answer == pytest.approx(Predictions.answers[name])


async def test_the_agent_plans_with_the_memory_of_the_servers_container(mesh: Installed) -> None:
    """The pod's capacity follows from the memory limit of the server's container, and the agent observes the server's
    memory."""
    pods = {pod["pod"]: pod for pod in json.loads(await mesh.mesh("pods", "--json"))["pods"]}
    for name in mesh.names("runtime", "ml"):
        assert pods[name]["capacity"] == capacity.auto_capacity(LIMIT)
        assert pods[name]["unobserved"] == ""


async def test_code_in_a_model_reaches_nothing_of_the_agent(mesh: Installed) -> None:
    """A program in the server's container sees the agent's processes. It can neither read their environment, their
    memory or their files, nor end them."""
    pod = mesh.names("runtime", "ml")[0]
    said = mesh.kube.exec(pod, "python", "-c", SPIES, container="server")
    assert json.loads(said) == [1000, dict.fromkeys(("environ", "memory", "files", "signals"), "refused")]


@pytest.mark.timeout(600)
async def test_a_rollout_of_the_pool_is_not_noticed(mesh: Installed) -> None:
    before = set(mesh.names("runtime", "ml"))
    async with Predictions(mesh) as traffic:
        mesh.kube.kubectl("rollout", "restart", "deployment/mesh-runtime-ml")
        await mesh.ready(480.0)
        await traffic.some(100)
    assert traffic.errors == []
    assert not before & set(mesh.names("runtime", "ml"))


@pytest.mark.timeout(600)
async def test_a_server_that_is_killed_is_restarted_and_loses_no_call(mesh: Installed) -> None:
    """Kubernetes restarts the container of a server that ends. Meanwhile the other pod serves the models, and no call
    fails."""
    pod = mesh.names("runtime", "ml")[0]

    def server() -> dict[str, Any]:
        (found,) = (one for one in mesh.pods("runtime", "ml") if one["metadata"]["name"] == pod)
        (status,) = found["status"]["initContainerStatuses"]
        return dict(status)

    before = server()["restartCount"]
    async with Predictions(mesh) as traffic:
        mesh.kube.exec(pod, "python", "-c", ENDS, container="server")
        await mesh.kube.until(lambda: server()["restartCount"] > before, "the server is restarted", timeout=120.0)
        await mesh.ready(300.0)
        await traffic.some(100)
    assert traffic.errors == []
