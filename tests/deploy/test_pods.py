"""Checks of every pod in every kind of installation: Pod Security `restricted`, quotas, and rights in one namespace
only."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy import manifests
from router.calls import dataplane
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

FILLED = {"mesh-certificates": "mesh-internal", "mesh-admin-key": "mesh-admin-key"}
"""The Secret that each Job with a token fills, by its service account."""

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
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            assert not spec.get(key), name
        if spec.get("shareProcessNamespace"):
            users = [one["securityContext"].get("runAsUser") for one in (*spec["initContainers"], *spec["containers"])]
            own = spec["securityContext"]["runAsUser"]
            assert len({user or own for user in users}) == len(users), f"{name}: each container has another user"
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
    """Beyond `restricted`, root file systems are read-only, writable volumes have a size limit, every volume is
    mounted, and only pods that need a token have one."""
    for name, pod in installs.pods(found):
        spec = pod["spec"]
        token = spec["automountServiceAccountToken"]
        verifies = "MESH_AUTH_KUBERNETES" in installs.env(spec["containers"][0])  # others' tokens
        assert token is (spec["serviceAccountName"] in FILLED or verifies), name
        assert spec["enableServiceLinks"] is False, f"{name}: variables like MESH_ETCD_PORT would be taken for options"
        for volume in spec.get("volumes", ()):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], f"{name}: {volume['name']}"
        containers = [*spec.get("initContainers", ()), *spec["containers"]]
        mounted = {mount["name"] for one in containers for mount in one["volumeMounts"]}
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
    """Each role covers one Secret by name. It cannot read other Secrets, and cannot create or delete any."""
    roles = {one["metadata"]["name"]: one for one in found if one["kind"] == "Role"}
    for name, role in roles.items():
        assert role["rules"] == [
            {
                "apiGroups": [""],
                "resources": ["secrets"],
                "resourceNames": [FILLED[name]],
                "verbs": ["get", "update"],
            }
        ]
    bindings = [one for one in found if one["kind"] == "RoleBinding"]
    assert {one["roleRef"]["name"] for one in bindings} == roles.keys()
    assert all([one["name"] for one in binding["subjects"]] == [binding["roleRef"]["name"]] for binding in bindings)
    secrets = [one for one in found if one["kind"] == "Secret" and one["metadata"]["name"] in FILLED.values()]
    assert len(secrets) == len(roles)
    for one in secrets:
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


SERVER = {
    "image": "example.com/triton:1",
    "types": ["triton", "onnx:2"],
    "spi": "unix:/run/triton/spi.sock",
    "args": ["--socket", "/run/triton/spi.sock"],
    "env": [{"name": "A", "value": "b"}],
    "ports": [{"containerPort": 8002}],
    "probes": {"liveness": {"httpGet": {"path": "/health", "port": 8002}}},
    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
}


def pool_of(**more: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the pod template of a pool with a model server of its own, its server and its agent."""
    given = {"name": "triton", "server": {**SERVER, **more.pop("server", {})}, **more}
    found = installs.rendered(f"pools={json.dumps([given])}")
    template = installs.one(found, "Deployment", "mesh-runtime-triton")["spec"]["template"]
    (server,), (agent,) = template["spec"]["initContainers"], template["spec"]["containers"]
    return template["spec"], server, agent


@installs.needs_helm
def test_a_pool_may_have_a_model_server_of_its_own():
    """The server runs in a sidecar with its own image. It has the pool's resources, and shares the models, the claims
    and the folder of the socket with the agent."""
    resources = {"requests": {"cpu": "1", "memory": "8Gi"}, "limits": {"cpu": "8", "memory": "8Gi"}}
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    spec, server, agent = pool_of(resources=resources, claims=["team"], gpu={"count": 1}, extraVolumes=volumes)

    assert server["restartPolicy"] == "Always", "started before the agent, and stopped after it"
    assert (server["image"], server["imagePullPolicy"]) == ("example.com/triton:1", "IfNotPresent")
    for key in ("args", "env", "ports"):
        assert server[key] == SERVER[key]
    assert "command" not in server
    assert server["livenessProbe"] == SERVER["probes"]["liveness"]
    assert server["resources"]["requests"] == resources["requests"]
    assert server["resources"]["limits"] == {**resources["limits"], "nvidia.com/gpu": "1"}

    env = installs.env(agent)
    assert (env["MESH_SERVER"], env["MESH_TYPES"]) == ("unix:/run/triton/spi.sock", "triton,onnx:2")
    assert env["MESH_LABELS"].split(",") == ["gpu"]
    assert "gpu" not in agent["image"]
    assert agent["resources"] == {
        "requests": {"cpu": "250m", "memory": "896Mi"},
        "limits": {"cpu": "2", "memory": "896Mi"},
    }

    at = {mount["mountPath"]: mount for mount in agent["volumeMounts"]}
    for mount in server["volumeMounts"]:
        if mount["mountPath"] not in ("/tmp", "/dev/shm"):
            assert at[mount["mountPath"]]["name"] == mount["name"]
            assert mount.get("readOnly", False) == (mount["name"] != "server-socket")
    assert {"/run/triton", "/var/lib/mesh/models", "/pvc_mounts/team"} <= {
        mount["mountPath"] for mount in server["volumeMounts"]
    }
    assert {"server-tmp", "server-socket"} <= {volume["name"] for volume in spec["volumes"]}


@installs.needs_helm
def test_a_server_on_a_port_shares_no_socket():
    """A server with a port on loopback needs no common folder. Its root file system can be made writable."""
    _, server, agent = pool_of(server={"spi": "127.0.0.1:9000", "readOnlyRootFilesystem": False, "volumeMounts": []})
    assert installs.env(agent)["MESH_SERVER"] == "127.0.0.1:9000"
    assert "server-socket" not in {mount["name"] for mount in [*server["volumeMounts"], *agent["volumeMounts"]]}
    assert server["securityContext"]["readOnlyRootFilesystem"] is False


@installs.needs_helm
@pytest.mark.parametrize(
    ("folder", "refused"), [("/tmp", True), ("/etc/mesh/etcd", True), ("/tmp/own", False), ("/run/triton", False)]
)
def test_a_socket_needs_a_folder_of_its_own(folder, refused):
    """A socket in a folder that has another volume is refused, and the error says where to put it."""
    if not refused:
        pool_of(server={"spi": f"unix:{folder}/spi.sock"})
        return
    with pytest.raises(manifests.Failed, match="Put the socket into a folder of its own, such as unix:/run/mesh"):
        pool_of(server={"spi": f"unix:{folder}/spi.sock"})


@installs.needs_helm
@pytest.mark.parametrize("server", [{"spi": "127.0.0.1:8085"}, {"ports": [{"containerPort": 8089}]}])
def test_a_server_cannot_have_a_port_of_the_agent(server):
    """The containers of a pod share their ports, so the agent's ports are refused for the server."""
    with pytest.raises(manifests.Failed, match=r"the agent of the pod listens on port 808[59]"):
        pool_of(server=server)


def mounted(found: list[dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Returns the path of the data-plane configuration in the routers, and the ConfigMap's part of its volume."""
    spec = installs.one(found, "Deployment", "mesh-router")["spec"]["template"]["spec"]
    (router,) = spec["containers"]
    path = Path(installs.env(router)["MESH_DATAPLANE_CONFIG_PATH"])
    (mount,) = (one for one in router["volumeMounts"] if one["mountPath"] == str(path.parent))
    assert "subPath" not in mount, "a file that is mounted by itself does not follow its ConfigMap"
    (volume,) = (one for one in spec["volumes"] if one["name"] == mount["name"])
    return path, volume["configMap"]


@installs.needs_helm
def test_the_data_plane_configuration_of_the_values_is_what_routers_read():
    """The document in the values becomes a ConfigMap. Routers mount it as a folder, so that they follow changes, and
    can parse its content."""
    document = {
        "rpcConfigs": {"a.B/c": {"idExtractionPath": [1, 536870911], "vModelId": True}, "a.B/d": {}},
        "allowOtherRpcs": True,
    }
    found = installs.rendered(f"router={json.dumps({'dataPlane': {'config': document}})}")
    path, source = mounted(found)
    data = installs.one(found, "ConfigMap", source["name"])["data"]
    (item,) = source["items"]
    assert item["path"] == path.name
    parsed = dataplane.parse(data[item["key"]])
    assert parsed == dataplane.parse(json.dumps(document))
    assert parsed.methods[b"/a.B/c"] == dataplane.Rule((1, 536870911), vmodel=True)


@installs.needs_helm
def test_a_data_plane_configuration_of_somebody_else_is_mounted():
    """The chart can mount a key of a ConfigMap that it does not create. Without any configuration, nothing is
    mounted."""
    given = {"dataPlane": {"configMap": "tc-config", "key": "dataplane_api_config"}}
    found = installs.rendered(f"router={json.dumps(given)}")
    path, source = mounted(found)
    assert source == {"name": "tc-config", "items": [{"key": "dataplane_api_config", "path": path.name}]}
    assert not [one for one in found if one["metadata"]["name"] == "mesh-dataplane"]
    (router,) = installs.one(installs.rendered(), "Deployment", "mesh-router")["spec"]["template"]["spec"]["containers"]
    assert "MESH_DATAPLANE_CONFIG_PATH" not in installs.env(router)
