"""Checks of every pod in every kind of installation: Pod Security `restricted`, quotas, and rights in one namespace
only."""

from typing import Any

import pytest

from tests.deploy import installs

ALLOWED = {
    ("v1", "ConfigMap"),
    ("v1", "PersistentVolumeClaim"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("batch/v1", "CronJob"),
    ("batch/v1", "Job"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
}
"""Kinds that the role `admin` of a namespace may create, in any cluster."""

ON_REQUEST = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}  # the Prometheus operator's, off by default

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds of volumes that `restricted` allows."""


@pytest.fixture(params=installs.ALL)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return installs.load(request.param)


@pytest.mark.parametrize("which", installs.ALL)
def test_kinds(which):
    """An admin of one namespace may create every object, because none is a CRD, a cluster role or a webhook."""
    for one in installs.load(which):
        if which == ("helm", "all-on") and one["kind"] in ON_REQUEST:
            continue
        assert (one["apiVersion"], one["kind"]) in ALLOWED
        assert "namespace" not in one["metadata"]  # valid in any namespace
        assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "mesh"


def test_no_two_alike(found):
    """No two objects have the same kind and name."""
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(names) == len(set(names))


def test_pod_security(found):
    """Every pod complies with Pod Security `restricted`."""
    for name, pod in installs.pods(found):
        spec = pod["spec"]
        for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            assert not spec.get(key), name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"].get("runAsUser", 1) > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert "sysctls" not in spec["securityContext"], name
        for volume in spec.get("volumes", ()):
            assert set(volume) - {"name"} <= VOLUMES, f"{name}: {volume}"
    for name, container in installs.containers(found):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["runAsNonRoot"] is True, name
        assert not context.get("privileged"), name
        assert "hostPort" not in str(container.get("ports")), name


def test_hardened(found):
    """Beyond `restricted`, writable volumes have a size limit, and only pods that need a token have one."""
    for name, pod in installs.pods(found):
        spec = pod["spec"]
        token = spec["automountServiceAccountToken"]
        assert token is (spec["serviceAccountName"] == "mesh-certificates"), name
        assert spec["enableServiceLinks"] is False, f"{name}: variables like MESH_ETCD_PORT would be taken for options"
        for volume in spec.get("volumes", ()):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], f"{name}: {volume['name']}"
        mounted = {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]}
        claimed = {"data"} if name == "StatefulSet/mesh-etcd" else set()
        assert mounted == {volume["name"] for volume in spec.get("volumes", ())} | claimed & mounted, name
    for name, container in installs.containers(found):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        # A file mounted by subPath does not follow its Secret.
        assert not [mount for mount in container["volumeMounts"] if "subPath" in mount], name
        writable = [mount for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert writable, f"{name} has no writable volume"


def test_accounts(found):
    """Every service account that is used exists, and none mounts its token by default."""
    accounts = {one["metadata"]["name"]: one for one in found if one["kind"] == "ServiceAccount"}
    for one in accounts.values():
        assert one["automountServiceAccountToken"] is False
    for name, pod in installs.pods(found):
        assert pod["spec"]["serviceAccountName"] in {*accounts, "mine"}, name


def test_rights(found):
    """The only role covers one Secret by name. It cannot read other Secrets, and cannot create or delete any."""
    roles = [one for one in found if one["kind"] == "Role"]
    for role in roles:
        assert role["rules"] == [
            {
                "apiGroups": [""],
                "resources": ["secrets"],
                "resourceNames": ["mesh-internal"],
                "verbs": ["get", "update", "patch"],
            }
        ]
    assert len(roles) == len([one for one in found if one["kind"] == "RoleBinding"]) <= 1
    secret = [one for one in found if (one["kind"], one["metadata"]["name"]) == ("Secret", "mesh-internal")]
    assert len(secret) == len(roles)
    for one in secret:
        # The Secret is empty, so that neither an upgrade nor an apply ever removes what the Job wrote.
        assert "data" not in one
        assert "stringData" not in one


def test_resources(found):
    """Every container has requests and limits, because quotas refuse pods without them and agents plan with the
    limits."""
    for name, container in installs.containers(found):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind]), f"{name}: {kind}"
    for name, container in installs.containers(found):
        if container["name"] == "runtime":
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"], name


def test_grace(found):
    """Kubernetes' grace period is longer than a pod needs to drain."""
    for name, pod in installs.pods(found):
        for container in pod["spec"]["containers"]:
            drain = installs.env(container).get("MESH_DRAIN_TIMEOUT")
            if drain is not None:
                wait = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                assert pod["spec"]["terminationGracePeriodSeconds"] >= wait + float(drain) + 10, name


def test_ports_by_name(found):
    """Probes and Services name ports that their containers have."""
    labels = {}
    for name, pod in installs.pods(found):
        for container in pod["spec"]["containers"]:
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            labels[name] = (pod["metadata"]["labels"], ports)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports, name
            annotated = pod["metadata"].get("annotations") or {}
            if "prometheus.io/port" in annotated:
                assert int(annotated["prometheus.io/port"]) == ports["probe"], name
    for service in (one for one in found if one["kind"] == "Service"):
        selected = [ports for own, ports in labels.values() if service["spec"]["selector"].items() <= own.items()]
        assert len(selected) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in selected[0], service["metadata"]["name"]


def test_selectors(found):
    """Workloads and disruption budgets select their own pods and no others."""
    templates = {name: pod["metadata"]["labels"] for name, pod in installs.pods(found)}
    for one in found:
        if one["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            wanted = one["spec"]["selector"]["matchLabels"].items()
            chosen = [name for name, labels in templates.items() if wanted <= labels.items()]
            assert [name.split("/")[1] for name in chosen] == [one["metadata"]["name"]]


def test_rollouts(found):
    """During a rollout there are never fewer routers than requested."""
    router = installs.one(found, "Deployment", "mesh-router")
    assert router["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_no_restart_for_secrets(found):
    """No pod template contains a checksum of a Secret or ConfigMap, because processes watch them all and need no
    restart."""
    for name, pod in installs.pods(found):
        assert not [key for key in pod["metadata"].get("annotations") or {} if "checksum" in key], name
