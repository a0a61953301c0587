"""Faults in a Kubernetes namespace, planted in kubectl's answers."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.cli.doctor.kubectl import Kubectl, KubectlError, parse
from tests.support.certificates import HOUR, certificate

LABELS = "app.kubernetes.io"


def named(kind: str, name: str, component: str = "", **more: Any) -> dict[str, Any]:
    labels = {f"{LABELS}/name": "mesh", f"{LABELS}/component": component} if component else {}
    return {"kind": kind, "metadata": {"name": name, "labels": labels}, **more}


def workload(name: str, component: str, *volumes: dict[str, Any], kind: str = "Deployment", ready: int = 1):
    template = {"spec": {"volumes": list(volumes), "containers": [{"name": component}]}}
    return named(kind, name, component, spec={"replicas": 1, "template": template}, status={"readyReplicas": ready})


def pod(name: str, component: str, *, ready: bool = True, claim: str = "", **status: Any) -> dict[str, Any]:
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True" if ready else "False"}]
    volumes = [{"persistentVolumeClaim": {"claimName": claim}}] if claim else []
    state = {"phase": "Running", "conditions": conditions, **status}
    return named("Pod", name, component, spec={"volumes": volumes}, status=state)


def secret(name: str, **data: bytes) -> dict[str, Any]:
    """Makes a Secret. Underscores in argument names become dots, except in `etcd_connection`."""
    keys = {key if key == "etcd_connection" else key.replace("_", "."): value for key, value in data.items()}
    return named("Secret", name, data={key: base64.b64encode(value).decode() for key, value in keys.items()})


def mounted(name: str, *keys: str, optional: bool = False) -> dict[str, Any]:
    items = [{"key": key, "path": key} for key in keys]
    return {"name": f"v-{name}", "secret": {"secretName": name, "items": items, "optional": optional}}


PAIR = certificate("mesh.internal", ends=100 * 24 * HOUR)
CONNECTION = {"endpoints": "https://mesh-etcd-0.mesh-etcd:2379", "root_prefix": "team-a", "certificate_file": "ca.crt"}


class Cluster:
    """The objects that the fake kubectl shows."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cluster.json"
        self.answer: dict[str, Any] = {
            "forbidden": [],
            "inside": json.dumps({"findings": []}),
            "objects": [
                workload("mesh-router", "router", self.projected()),
                workload("mesh-runtime-cpu", "runtime", mounted("storage-config", optional=True)),
                pod("mesh-router-1", "router"),
                pod("mesh-runtime-cpu-1", "runtime"),
                secret("mesh-etcd-connection", etcd_connection=json.dumps(CONNECTION).encode()),
                secret("mesh-internal", ca_crt=PAIR[0], tls_crt=PAIR[1], tls_key=PAIR[1]),
            ],
        }
        self.write()

    @staticmethod
    def projected() -> dict[str, Any]:
        items = [{"key": key, "path": key} for key in ("ca.crt", "tls.crt", "tls.key")]
        sources = [{"name": "mesh-etcd-connection"}, {"name": "mesh-internal", "items": items}]
        return {"name": "etcd", "projected": {"sources": [{"secret": source} for source in sources]}}

    def write(self) -> None:
        self.file.write_text(json.dumps(self.answer))

    def add(self, *objects: dict[str, Any]) -> None:
        """Adds objects. An object replaces one with the same name."""
        names = {(one["kind"], one["metadata"]["name"]) for one in objects}
        kept = [one for one in self.answer["objects"] if (one["kind"], one["metadata"]["name"]) not in names]
        self.answer["objects"] = [*kept, *objects]
        self.write()

    def remove(self, name: str) -> None:
        self.answer["objects"] = [one for one in self.answer["objects"] if one["metadata"]["name"] != name]
        self.write()

    def set(self, **more: Any) -> None:
        self.answer |= more
        self.write()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A fake kubectl on PATH that shows a namespace without faults."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(f"#!{sys.executable}\n{Path(__file__).with_name('fakekubectl.py').read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return Cluster(folder)


def looked(doctor, *arguments: str):
    return doctor("--only", "kubernetes", *arguments)


def test_a_healthy_namespace_has_nothing_but_ok(doctor, cluster: Cluster) -> None:
    visit = looked(doctor)
    assert (visit.code, visit.bad) == (0, [])
    assert "team-a" in visit.said("ok", "kubernetes", "reach")
    assert "1 router, 1 runtime" in visit.said("ok", "kubernetes", "pods")
    assert "mesh-etcd-0" in visit.said("ok", "secrets", "etcd")


def waiting(reason: str, message: str = "") -> list[dict[str, Any]]:
    return [{"name": "runtime", "restartCount": 3, "state": {"waiting": {"reason": reason, "message": message}}}]


def test_an_image_that_cannot_be_pulled(doctor, cluster: Cluster) -> None:
    statuses = waiting("ImagePullBackOff", 'Back-off pulling image "mesh:typo"')
    cluster.add(pod("mesh-runtime-cpu-1", "runtime", ready=False, containerStatuses=statuses))
    text = looked(doctor).said("fail", "kubernetes", "pods")
    assert 'mesh-runtime-cpu-1 (runtime): ImagePullBackOff: Back-off pulling image "mesh:typo"' in text
    assert "imagePullSecrets" in text


def test_a_pod_that_was_killed_for_memory(doctor, cluster: Cluster) -> None:
    """A pod that was killed for lack of memory is a finding, even if it runs again."""
    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": "2026-01-01T00:00:00Z"}}
    statuses = [{"name": "runtime", "restartCount": 4, "state": {"running": {}}, "lastState": ended}]
    cluster.add(pod("mesh-runtime-cpu-1", "runtime", containerStatuses=statuses))
    text = looked(doctor).said("warn", "kubernetes", "memory")
    assert "OOMKilled) at 2026-01-01T00:00:00Z, 4 restarts" in text
    assert "raise its memory limit" in text


def test_a_pod_that_ends_again_and_again(doctor, cluster: Cluster) -> None:
    cluster.add(pod("mesh-router-1", "router", ready=False, containerStatuses=waiting("CrashLoopBackOff")))
    assert "kubectl logs mesh-router-1 --previous" in looked(doctor).said("fail", "kubernetes", "pods")


def test_a_pod_that_fits_no_node(doctor, cluster: Cluster) -> None:
    """A pod that fits on no node is reported in the scheduler's own words."""
    why = "0/1 nodes are available: 1 Insufficient memory."
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}]
    cluster.add(pod("mesh-runtime-cpu-1", "runtime", phase="Pending", conditions=conditions))
    assert why in looked(doctor).said("fail", "kubernetes", "pods")


def test_a_pod_that_cannot_mount(doctor, cluster: Cluster) -> None:
    why = 'MountVolume.SetUp failed for volume "internal" : references non-existent secret key: ca.crt'
    about = {"kind": "Pod", "name": "mesh-router-1"}
    cluster.add(
        pod("mesh-router-1", "router", ready=False),
        named("Event", "e1", involvedObject=about, type="Warning", reason="FailedMount", message=why),
    )
    assert why in looked(doctor).said("warn", "kubernetes", "pods")


def test_pods_that_are_not_made(doctor, cluster: Cluster) -> None:
    """Pods that a quota refuses are found through their Deployment, because only the Deployment shows the refusal."""
    refused = {"type": "ReplicaFailure", "status": "True", "message": "pods is forbidden: exceeded quota: team-a"}
    broken = workload("mesh-runtime-cpu", "runtime", ready=0)
    broken["status"]["conditions"] = [refused]
    cluster.add(broken)
    cluster.remove("mesh-runtime-cpu-1")
    text = looked(doctor).said("fail", "kubernetes", "workload")
    assert "exceeded quota" in text
    assert "larger quota" in text


def test_a_volume_that_is_not_made(doctor, cluster: Cluster) -> None:
    claim = named("PersistentVolumeClaim", "data-mesh-etcd-0", status={"phase": "Pending"})
    about = {"kind": "PersistentVolumeClaim", "name": "data-mesh-etcd-0"}
    why = "no persistent volumes available for this claim and no storage class is set"
    cluster.add(
        claim,
        pod("mesh-etcd-0", "etcd", claim="data-mesh-etcd-0"),
        named("Event", "e1", involvedObject=about, type="Warning", reason="FailedBinding", message=why),
    )
    text = looked(doctor).said("fail", "kubernetes", "volumes")
    assert why in text
    assert "storageClassName" in text


def test_a_volume_that_waits_for_its_pod_is_not_the_storage_classs_fault(doctor, cluster: Cluster) -> None:
    claim = named("PersistentVolumeClaim", "data-mesh-etcd-0", status={"phase": "Pending"})
    about = {"kind": "PersistentVolumeClaim", "name": "data-mesh-etcd-0"}
    why = "waiting for pod mesh-etcd-0 to be scheduled"
    cluster.add(
        claim,
        pod("mesh-etcd-0", "etcd", claim="data-mesh-etcd-0"),
        named("Event", "e1", involvedObject=about, type="Normal", reason="WaitForPodScheduled", message=why),
    )
    text = looked(doctor).said("warn", "kubernetes", "volumes")
    assert "waits for its pod" in text
    assert "storageClass" not in text


REFUSED = 'pods "mesh-certificates-1-x" is forbidden: minimum cpu usage per Container is 100m, but request is 50m'


@pytest.mark.parametrize(
    ("job", "meaning"),
    [
        ("mesh-certificates-4a1b", "certificate"),
        ("mesh-admin-key-93f0", "admin's key"),
        ("mesh-etcd-snapshots-2901", "snapshots"),
    ],
)
def test_a_job_whose_pods_are_refused(doctor, cluster: Cluster, job: str, meaning: str) -> None:
    """A Job whose pods are refused, for instance by a LimitRange, is a finding until it has succeeded. No pod would
    show the fault."""
    about = {"kind": "Job", "name": job}
    event = named("Event", "e1", involvedObject=about, type="Warning", reason="FailedCreate", message=REFUSED)
    cluster.add(named("Job", job, status={"failed": 0}), event)
    text = looked(doctor).said("fail", "kubernetes", "jobs")
    assert REFUSED in text
    assert meaning in text
    assert "values `jobs`" in text
    cluster.add(named("Job", job, status={"succeeded": 1}))
    assert looked(doctor).bad == []


def test_somebody_elses_jobs_are_none_of_its_business(doctor, cluster: Cluster) -> None:
    about = {"kind": "Job", "name": "theirs"}
    event = named("Event", "e1", involvedObject=about, type="Warning", reason="FailedCreate", message=REFUSED)
    cluster.add(named("Job", "theirs", status={}), event)
    assert looked(doctor).bad == []


@pytest.mark.parametrize(
    ("reason", "todo"),
    [("FailedGetResourceMetric", "metrics-server"), ("FailedGetPodsMetric", "prometheus-adapter")],
)
def test_an_autoscaler_without_its_metric(doctor, cluster: Cluster, reason: str, todo: str) -> None:
    """An autoscaler without its metric is reported, because nothing else shows that it does nothing. An autoscaler that
    is disabled by 0 replicas is not."""
    condition = {"type": "ScalingActive", "status": "False", "reason": reason, "message": "no metrics returned"}
    scaler = named("HorizontalPodAutoscaler", "mesh-runtime-cpu", "runtime", status={"conditions": [condition]})
    cluster.add(scaler)
    text = looked(doctor).said("warn", "kubernetes", "autoscaling")
    assert f"mesh-runtime-cpu does not scale: {reason}: no metrics returned" in text
    assert todo in text
    condition["reason"] = "ScalingDisabled"
    cluster.add(scaler)
    assert looked(doctor).bad == []


def test_secrets_alone(doctor, cluster: Cluster) -> None:
    """Secrets are checked together with Kubernetes, but `--only secrets` shows only findings about Secrets."""
    cluster.remove("mesh-etcd-connection")
    visit = doctor("--only", "secrets")
    assert visit.said("fail", "secrets", "there")
    assert {one["area"] for one in visit.findings} == {"secrets"}


def test_somebody_elses_volumes_are_none_of_its_business(doctor, cluster: Cluster) -> None:
    """Volumes of other applications are ignored. So is a claim of the mesh that waits for its first pod, as before the
    first snapshot."""
    cluster.add(
        named("PersistentVolumeClaim", "theirs", status={"phase": "Pending"}),
        named("PersistentVolumeClaim", "mesh-etcd-snapshots", "snapshot", status={"phase": "Pending"}),
    )
    assert looked(doctor).bad == []


def test_a_secret_that_is_missing(doctor, cluster: Cluster) -> None:
    cluster.remove("mesh-etcd-connection")
    text = looked(doctor).said("fail", "secrets", "there")
    assert "there is no Secret mesh-etcd-connection, and mesh-router cannot start" in text
    assert "helm upgrade" in text


def uses(name: str, *keys: str) -> dict[str, Any]:
    """Returns a workload that mounts this Secret, or without `keys` uses it to pull its image."""
    items = [{"key": key, "path": key} for key in keys]
    volume = {"name": "it", "secret": {"secretName": name, "items": items}}
    spec = {"volumes": [volume]} if keys else {"imagePullSecrets": [{"name": name}]}
    template = {"template": {"spec": spec}, "replicas": 1}
    return named("Deployment", "mesh-runtime-more", "runtime", spec=template, status={"readyReplicas": 1})


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        pytest.param(
            "mesh-internal",
            ("ca.crt", "tls.crt", "tls.key"),
            ["kubectl create secret generic mesh-internal && kubectl create job --from=cronjob/mesh-certificates"],
            id="the-charts-certificate",
        ),
        pytest.param(
            "ours",
            ("ca.crt", "tls.crt", "tls.key"),
            ["kubectl create secret generic ours --from-file=ca.crt --from-file=tls.crt --from-file=tls.key"],
            id="ones-own",
        ),
        pytest.param("pull", (), ["kubectl create secret docker-registry pull"], id="registry"),
    ],
)
def test_how_a_missing_secret_is_made(doctor, cluster: Cluster, name: str, keys: tuple[str, ...], words: list[str]):
    """The finding about a missing Secret contains the command that creates it."""
    cluster.remove(name)
    cluster.add(uses(name, *keys))
    text = looked(doctor).said("fail", "secrets", "there")
    for word in words:
        assert word in text


def test_a_secret_without_its_keys(doctor, cluster: Cluster) -> None:
    """A Secret without its keys is reported, such as the Secret of the chart's certificates before its Job has run."""
    cluster.add(secret("mesh-internal"))
    text = looked(doctor).said("fail", "secrets", "keys")
    assert "no key ca.crt, tls.crt, tls.key" in text
    assert "Job mesh-certificates" in text


def test_an_admin_key_that_was_not_made(doctor, cluster: Cluster) -> None:
    """The empty Secret of the admin's key is reported, with the Job that should have filled it."""
    cluster.add(secret("mesh-admin-key"), uses("mesh-admin-key", "admin.key"))
    text = looked(doctor).said("fail", "secrets", "keys")
    assert "the Secret mesh-admin-key has no key admin.key" in text
    assert "Job mesh-admin-key" in text


def test_an_expired_certificate_in_a_secret(doctor, cluster: Cluster) -> None:
    authority, server = certificate("mesh.internal", ends=-HOUR)
    cluster.add(secret("mesh-internal", ca_crt=authority, tls_crt=server, tls_key=server))
    text = looked(doctor).said("fail", "secrets", "expiry")
    assert "tls.crt of the Secret mesh-internal (server) expired" in text
    assert "cronjob/mesh-certificates" in text


def test_a_key_of_another_certificate(doctor, cluster: Cluster) -> None:
    other = certificate("mesh.internal")[1]
    cluster.add(secret("mesh-internal", ca_crt=PAIR[0], tls_crt=PAIR[1], tls_key=other))
    assert "is not the key of its tls.crt" in looked(doctor).said("fail", "secrets", "keys")


def test_a_connection_that_cannot_be_read(doctor, cluster: Cluster) -> None:
    """A connection that cannot be parsed is reported with its fault, without the password."""
    cluster.add(secret("mesh-etcd-connection", etcd_connection=b'{"endpoints": "", "password": "hunter2"}'))
    visit = looked(doctor)
    assert "`endpoints` is missing" in visit.said("fail", "secrets", "etcd")
    assert "hunter2" not in json.dumps(visit.findings)


def test_a_store_that_cannot_be_read(doctor, cluster: Cluster) -> None:
    cluster.add(secret("storage-config", good=b'{"type": "s3"}', bad=b"{secret"))
    visit = looked(doctor)
    assert "bad is not JSON" in visit.said("fail", "secrets", "storage")
    assert "{secret" not in json.dumps(visit.findings)


def test_rights_that_are_missing(doctor, cluster: Cluster) -> None:
    """Missing rights are reported with what they are for, and pods are still checked."""
    cluster.set(forbidden=["secrets"])
    visit = looked(doctor)
    assert "get secrets (check Secrets, and install)" in visit.said("warn", "kubernetes", "rights")
    assert visit.said("ok", "kubernetes", "pods")


def test_no_mesh_in_the_namespace(doctor, cluster: Cluster) -> None:
    """A namespace without a mesh is a fault if the area was requested by name. Otherwise the area is skipped."""
    cluster.set(objects=[])
    assert "--namespace" in looked(doctor).said("fail", "kubernetes", "reach")
    visit = doctor("--endpoint", "http://127.0.0.1:9")
    assert (
        "there is no mesh in the namespace team-a" in {one["area"]: one["why"] for one in visit.skipped}["kubernetes"]
    )


def test_a_cluster_that_does_not_answer(doctor, cluster: Cluster) -> None:
    cluster.set(down=True)
    assert "was refused" in looked(doctor).said("fail", "kubernetes", "reach")


def test_a_routers_pod_looks_at_etcd(doctor, cluster: Cluster) -> None:
    """If no etcd is given, a router's pod checks it, and the doctor shows the pod's findings. If the pod's Mesh has no
    doctor, the area is skipped."""
    inside = {"level": "fail", "area": "etcd", "check": "alarm", "what": "alarm NOSPACE from etcd-0", "todo": "raise"}
    cluster.set(inside=json.dumps({"findings": [inside]}))
    visit = doctor("--endpoint", "http://127.0.0.1:9")
    assert "NOSPACE" in visit.said("fail", "etcd", "alarm")
    assert "mesh-router" in visit.said("ok", "etcd", "inside")
    cluster.set(inside="Error: No such command 'doctor'.")
    assert "etcd" in {one["area"] for one in doctor("--endpoint", "http://127.0.0.1:9").skipped}


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ('{"items": [{}, {}]}', 2), ('{"kind": "Pod"}', 1), ('{"a": 1}\n{"b": 2}\n', 2)]
)
def test_what_kubectl_prints(text: str, count: int) -> None:
    """kubectl's output may be empty, a list, one object or several objects in sequence."""
    assert len(parse(text)) == count


async def test_what_kubectl_should_not_print(tmp_path: Path) -> None:
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\necho what\n")
    program.chmod(0o755)
    with pytest.raises(KubectlError, match="`kubectl get pods` should print JSON, but printed: what"):
        await Kubectl(str(program), "", timeout=10.0).items("get", "pods")
