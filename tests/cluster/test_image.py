"""The image with minimal rights: any uid, a read-only root, and only /tmp writable."""

import base64
import json

import pytest

from deploy.cluster import layout
from tests.support import models
from tests.support.cluster import Kube, pod, ready_at

_ETCD = layout.ETCD_VERSION.removeprefix("v")
_COMMANDS = {
    "help": (None, ["--help"], "Thousands of models"),
    "runtime": (None, ["runtime", "--help"], "--capacity"),
    "router": (None, ["router", "--help"], "--listen"),
    "module": (["python", "-m", "mesh.runtime"], ["--help"], "--capacity"),
    "etcd": (["etcd"], ["--version"], _ETCD),
    "etcdctl": (["etcdctl"], ["version"], _ETCD),
    "etcdutl": (["etcdutl"], ["version"], _ETCD),
    "whoami": (["id"], [], "gid=0(root)"),
}


@pytest.mark.parametrize("uid", [None, 1_000_730_000], ids=["its own uid", "a random uid"])
async def test_every_program_starts(namespace: Kube, image: str, uid: int | None) -> None:
    """Each program of the image starts under the image's own uid and under a uid that the image does not know."""
    containers = [
        {"name": name, "image": image, "args": args, **({"command": command} if command else {})}
        for name, (command, args, _) in _COMMANDS.items()
    ]
    namespace.apply(pod("programs", *containers, uid=uid))
    await namespace.wait("pod/programs", "jsonpath={.status.phase}=Succeeded", timeout=90.0)
    for name, (_, _, expected) in _COMMANDS.items():
        assert expected in namespace.logs("programs", name), name
    assert f"uid={uid or 10001}" in namespace.logs("programs", "whoami")


async def test_a_whole_mesh_runs_from_it(namespace: Kube, image: str) -> None:
    """etcd, a runtime pod and a router behind Envoy become ready from the image with only /tmp writable."""

    def probed(port: int) -> dict[str, object]:
        return {"readinessProbe": ready_at("/ready", port)}

    etcd = ["--data-dir=/tmp/etcd", "--unsafe-no-fsync"]
    runtime = ["runtime", "--capacity=64MiB", "--probe=0.0.0.0:8001"]
    router = ["router", "--listen=0.0.0.0:8033", "--probe=0.0.0.0:8002"]
    namespace.apply(
        pod(
            "mesh",
            {"name": "etcd", "image": image, "command": ["etcd"], "args": etcd},
            {"name": "runtime", "image": image, "args": runtime, **probed(8001)},
            {"name": "router", "image": image, "args": router, **probed(8002)},
            uid=1_000_730_000,
        )
    )
    await namespace.wait("pod/mesh", "condition=Ready", timeout=90.0)
    pods = json.loads(namespace.exec("mesh", "mesh", "pods", "--json", container="router"))
    assert "mesh" in json.dumps(pods), "the runtime pod has its host's name"


_LOWER = """
import base64, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(base64.b64decode(sys.stdin.read()))
((text,),) = session.run(None, {session.get_inputs()[0].name: numpy.array(["GR\\u00d6SSE"], object)})
print(ascii(text))
"""


async def test_models_that_work_on_texts_have_their_locale(namespace: Kube, image: str) -> None:
    """The image has the locale that scikit-learn's converter writes into text models."""
    namespace.apply(pod("texts", {"name": "it", "image": image, "command": ["sleep", "600"]}))
    await namespace.wait("pod/texts", "condition=Ready")
    given = base64.b64encode(models.lower("en_US.UTF-8")).decode()
    said = namespace.kubectl("exec", "--stdin", "texts", "--", "python", "-c", _LOWER, given=given)
    assert said.strip() == ascii("gr\u00f6sse")
