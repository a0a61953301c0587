"""Installation without Helm: `kubectl apply -k` of the base and a component."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy import manifests
from tests.support.cluster import Kube, KubeError
from tests.support.installed import Installed, Traffic


def kustomization(image: str, namespace: str, folder: Path) -> dict[str, Any]:
    """Returns a kustomization like that in the docs, but with models from a private address and small resource
    requests."""
    up = "../" * len(folder.parts[1:])  # kustomize takes relative paths only
    name, _, tag = image.rpartition(":")
    patch = [
        {
            "op": "add",
            "path": "/spec/template/spec/containers/0/env/-",
            "value": {"name": "MESH_HTTP_ALLOW_PRIVATE", "value": "true"},
        },
        {"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": "20m"},
    ]
    return {
        "namespace": namespace,
        "resources": [f"{up}{str(manifests.KUSTOMIZE).lstrip('/')}/base"],
        "components": [f"{up}{str(manifests.KUSTOMIZE).lstrip('/')}/components/trial"],
        "images": [{"name": "mesh", "newName": name, "newTag": tag}],
        "patches": [{"target": {"kind": "Deployment", "name": "mesh-runtime-cpu"}, "patch": json.dumps(patch)}],
    }


async def test_a_mesh_is_applied_and_deleted(namespace: Kube, image: str, tmp_path: Path) -> None:
    """The applied mesh serves its models, and keeps the admin's key when it is applied again. Helm refuses to install
    another one over it, and nothing is left after its deletion."""
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization(image, namespace.namespace, tmp_path)))
    mesh = Installed(namespace, image)
    mesh.typed("Install with kustomize", folder=tmp_path)
    await mesh.ready()
    await mesh.offer(10)
    async with Traffic(mesh) as traffic:
        await traffic.some(100)
    assert traffic.errors == []
    key = mesh.credentials()
    assert key
    mesh.typed("Install with kustomize", folder=tmp_path)
    await mesh.ready()
    assert mesh.credentials() == key
    with pytest.raises(KubeError, match=r"The namespace .* already has a mesh .*, installed without Helm"):
        mesh.helm("install", "mesh")
    namespace.kubectl("delete", "-k", str(tmp_path), timeout=120.0)
    await namespace.until(lambda: not mesh.left(), "nothing is left", timeout=90.0)
