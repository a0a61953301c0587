"""Helm's checks of the namespace before an installation: another mesh, and Secrets that are missing or wrong."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests
from tests.deploy import fakecluster, installs

pytestmark = installs.needs_helm

EXTERNAL = 'etcd={"embedded":false}'
CONNECTION = '{"endpoints": "https://etcd:2379", "certificate_file": "ca.crt"}'


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sets a temporary home, because Helm otherwise caches what it learns about a cluster in the user's home directory
    or in the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def router(release: str, *, helm: bool = True, replicas: int = 2) -> dict[str, Any]:
    """Returns the Deployment of an existing router."""
    labels = {
        "app.kubernetes.io/name": "mesh",
        "app.kubernetes.io/component": "router",
        "app.kubernetes.io/instance": release,
    }
    annotations = {"meta.helm.sh/release-name": release} if helm else {}
    metadata = {"name": "mesh-router", "namespace": "mesh", "labels": labels, "annotations": annotations}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"replicas": replicas}}


def etcd(members: int) -> dict[str, Any]:
    """Returns the StatefulSet of an existing etcd."""
    metadata = {"name": "mesh-etcd", "namespace": "mesh"}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": {"replicas": members}}


def install(objects: list[dict[str, Any]], folder: Path, *sets: str) -> str:
    """Returns Helm's error, or an empty text if Helm accepts the installation."""
    done = render(objects, folder, *sets)
    return done.stderr if done.returncode else ""


def render(objects: list[dict[str, Any]], folder: Path, *sets: str) -> subprocess.CompletedProcess[str]:
    """Renders the chart for a namespace that has these objects."""
    with fakecluster.serve(objects, folder) as config:
        command = [str(manifests.helm()), "template", "mesh", str(manifests.CHART), "--namespace", "mesh"]
        command += ["--kubeconfig", str(config), "--dry-run=server", "--kube-version", manifests.KUBERNETES]
        for text in sets:
            command += ["--set-json", text]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("given", "replicas"),
    [
        pytest.param({"replicas": 2}, 2, id="given"),
        pytest.param({"replicas": None}, 5, id="left-to-kubectl"),
        pytest.param({"autoscaling": {"enabled": True}}, 5, id="left-to-an-autoscaler"),
    ],
)
def test_replicas_that_others_decide(given: dict[str, Any], replicas: int, tmp_path: Path):
    """An upgrade keeps the running number of replicas if an autoscaler or a person sets it. Kubernetes would reset an
    omitted number to 1."""
    done = render([router("mesh", replicas=5)], tmp_path, f"router={json.dumps(given)}")
    (deployment,) = [
        one
        for one in yaml.load_all(done.stdout, manifests.LOADER)
        if one and manifests.key(one) == ("Deployment", "mesh-router")
    ]
    assert deployment["spec"]["replicas"] == replicas


@pytest.mark.parametrize(
    ("objects", "sets", "words"),
    [
        pytest.param([router("first")], [], ['release "first"', "One namespace holds one mesh", "helm upgrade first"]),
        pytest.param([router("mesh", helm=False)], [], ["installed without Helm", "One namespace holds one mesh"]),
        pytest.param([router("mesh"), etcd(1)], [], ["etcd.members is 3", "has 1", "mesh backup", "mesh restore"]),
        pytest.param([], [EXTERNAL], ['"model-serving-etcd"', "is not in the namespace mesh", "etcd.embedded=true"]),
        pytest.param(
            [fakecluster.secret("model-serving-etcd", other="x")], [EXTERNAL], ["no key etcd_connection", "endpoints"]
        ),
        pytest.param(
            [fakecluster.secret("model-serving-etcd", etcd_connection="etcd:2379")], [EXTERNAL], ["JSON", "endpoints"]
        ),
        pytest.param(
            [fakecluster.secret("model-serving-etcd", etcd_connection=CONNECTION)], [EXTERNAL], ['the key "ca.crt"']
        ),
        pytest.param([], ['tls={"secretName":"edge"}'], ["tls.secretName", '"edge"', "tls.crt, tls.key"]),
        pytest.param(
            [fakecluster.secret("edge", tls_crt="x")], ['tls={"secretName":"edge"}'], ['"edge"', "no key tls.key"]
        ),
        pytest.param(
            [fakecluster.secret("edge", tls_crt="x", tls_key="x")],
            ['tls={"secretName":"edge","clientAuth":"require"}'],
            ["tls.clientCASecret", '"edge"', "no key ca.crt"],
        ),
        pytest.param([], ['internalTLS={"existingSecret":"own"}'], ["internalTLS.existingSecret", '"own"', "ca.crt"]),
        pytest.param([], ['auth={"existingSecret":"own"}'], ["auth.existingSecret", '"own"', "admin.key"]),
    ],
)
def test_refused(objects: list[dict[str, Any]], sets: list[str], words: list[str], tmp_path: Path):
    """If Helm refuses an installation, the error names the fault and says what to do."""
    said = install(objects, tmp_path, *sets)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("objects", "sets"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([router("mesh"), etcd(3)], [], id="upgrade"),
        pytest.param(
            [fakecluster.secret("model-serving-etcd", etcd_connection=CONNECTION, ca_crt="x")],
            [EXTERNAL],
            id="external",
        ),
        pytest.param(
            [fakecluster.secret("edge", tls_crt="x", tls_key="x"), fakecluster.secret("clients", ca_crt="x")],
            ['tls={"secretName":"edge","clientAuth":"require","clientCASecret":"clients"}'],
            id="tls",
        ),
    ],
)
def test_not_refused(objects: list[dict[str, Any]], sets: list[str], tmp_path: Path):
    """A first installation, an upgrade of the same release, and correct Secrets are accepted."""
    assert install(objects, tmp_path, *sets) == ""


@pytest.mark.parametrize(
    ("sets", "words", "others"),
    [
        pytest.param(
            [],
            [
                "plain HTTP, so others on the network can read the keys",
                "helm uninstall",
                "Inference is open; everything else needs a key",
                r"get secret mesh-admin-key -o 'jsonpath={.data.admin\.key}'",
            ],
            ["emptyDir", "not encrypted", "auth.mode"],
            id="defaults",
        ),
        pytest.param(
            ['auth={"mode":"required"}'], ["Every request needs a key", "mesh-admin-key"], ["auth.mode"], id="required"
        ),
        pytest.param(
            ['auth={"mode":"off"}'],
            ["as with ModelMesh (auth.mode=off)", "auth.mode=management", "3. Register"],
            ["MESH_API_KEY", "admin-key", "read the keys"],
            id="open",
        ),
        pytest.param(
            [
                'etcd={"members":1,"storage":{"kind":"emptyDir"}}',
                'internalTLS={"enabled":false}',
                'networkPolicy={"enabled":false}',
            ],
            ["lost with the pod mesh-etcd-0", "not encrypted", "No NetworkPolicies"],
            ["etcd.storage.keep"],
            id="careless",
        ),
        pytest.param(
            ['tls={"secretName":"edge","clientAuth":"require"}', 'etcd={"storage":{"keep":true}}'],
            ["https://modelmesh-serving.mesh:8008", "Nothing in the values calls for a warning"],
            ["!"],
            id="careful",
        ),
    ],
)
def test_notes(sets: list[str], words: list[str], others: list[str], tmp_path: Path):
    """The notes after an installation say what to do next and warn about risky values."""
    edge = fakecluster.secret("edge", tls_crt="x", tls_key="x", ca_crt="x")
    with fakecluster.serve([edge], tmp_path) as config:
        command = [str(manifests.helm()), "install", "mesh", str(manifests.CHART), "--namespace", "mesh"]
        command += ["--kubeconfig", str(config), "--dry-run=client", "--disable-openapi-validation"]
        for text in sets:
            command += ["--set-json", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.rpartition("NOTES:")[2]
    for word in ["rollout status deployment/mesh-router", "mesh doctor", *words]:
        assert word in notes
    for word in others:
        assert word not in notes
