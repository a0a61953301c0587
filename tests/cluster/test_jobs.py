"""Jobs whose pods the namespace refuses, and autoscalers without metrics: doctor reports both."""

from typing import Any

from tests.support.cluster import Kube
from tests.support.installed import Installed
from tests.support.visits import Visits

LIMITS: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "LimitRange",
    "metadata": {"name": "least"},
    "spec": {"limits": [{"type": "Container", "min": {"cpu": "70m"}}]},
}
SMALL = {"router": {"replicas": 1}, "pools": [{"name": "cpu", "replicas": 1}]}


def asking(cpu: str) -> dict[str, Any]:
    """Returns values with that CPU request for all pods except those of the Jobs."""
    resources = {"resources": {"requests": {"cpu": cpu}}}
    return {
        "router": {**SMALL["router"], **resources},
        "runtime": resources,
        "pools": SMALL["pools"],
        "etcd": resources,
    }


async def test_a_limit_range_that_refuses_a_jobs_pod(cluster: Kube, namespace: Kube, image: str) -> None:
    """When a LimitRange refuses a Job's pod, doctor shows the refusal and names the values that help. With these values
    the mesh becomes ready."""
    cluster.within(namespace.namespace).apply(LIMITS)
    mesh = Installed(namespace, image)
    mesh.helm("install", "mesh", over=asking("70m"))
    visits = Visits(mesh, "--only", "kubernetes", kube=namespace)
    expected = ("fail", "kubernetes", "jobs", "minimum cpu usage per Container is 70m", "mesh-certificates", "`jobs`")
    await visits.until_said([expected])
    mesh.helm("upgrade", "mesh", over={**asking("70m"), "jobs": {"resources": {"requests": {"cpu": "70m"}}}})
    await mesh.ready(180.0)


async def test_an_autoscaler_without_metrics(namespace: Kube, image: str) -> None:
    """Doctor reports an autoscaler that gets no metrics because the cluster has no metrics server. Otherwise only the
    autoscaler's own status shows that."""
    mesh = Installed(namespace, image)
    scaling = {"autoscaling": {"enabled": True, "minReplicas": 1}}
    pools = [{**SMALL["pools"][0], **scaling}]
    mesh.helm("install", "mesh", over={"router": {"replicas": 1, **scaling}, "pools": pools})
    visits = Visits(mesh, "--only", "kubernetes", kube=namespace)
    await visits.until_said(
        [
            ("warn", "kubernetes", "autoscaling", "mesh-router does not scale"),
            ("warn", "kubernetes", "autoscaling", "mesh-runtime-cpu does not scale"),
        ]
    )
