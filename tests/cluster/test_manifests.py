"""The manifests, which a real API server accepts without a warning from the admin of one namespace."""

from typing import Any

import pytest

from deploy import manifests
from deploy.cluster import layout
from tests.deploy import installs
from tests.support.cluster import Kube, KubeError, pod

OPERATOR = "monitoring.coreos.com/v1"
"""Kinds of the Prometheus operator, which this cluster does not have."""


@pytest.fixture(autouse=True)
def helm(cluster: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tests use the test cluster's helm, even if the machine has another one."""
    monkeypatch.setenv("HELM", str(layout.BIN / "helm"))


def check(namespace: Kube, found: list[dict[str, Any]]) -> None:
    known = [one for one in found if one["apiVersion"] != OPERATOR]
    assert len(known) > 5
    # The API server checks a RoleBinding against the rights in its Role, so the Role must exist.
    if roles := [one for one in known if one["kind"] == "Role"]:
        namespace.apply(*roles)
    assert namespace.dry_run(*known) == []


@pytest.mark.parametrize("name", installs.RENDERED)
def test_the_chart(namespace: Kube, name: str) -> None:
    """The API server accepts the chart with every set of values that the tests render."""
    check(namespace, installs.rendered(*installs.RENDERED[name], namespace=namespace.namespace))


@pytest.mark.parametrize("name", installs.PATCHED)
def test_kustomize(namespace: Kube, name: str) -> None:
    """The API server accepts kustomize's base, alone and with each component."""
    check(namespace, installs.patched(name))


def test_what_is_wrong_is_found(namespace: Kube) -> None:
    """The API server's validation, on which these tests rely, refuses an unknown field and warns about a careless
    template."""
    found = installs.patched("trial")
    deployment = installs.one(found, "Deployment", "mesh-router")
    del deployment["spec"]["template"]["spec"]["securityContext"]["seccompProfile"]
    (warning,) = namespace.dry_run(deployment)
    assert "seccompProfile" in warning
    with pytest.raises(KubeError, match="unknown field"):
        namespace.dry_run(pod("careless", {"name": "it", "image": "any", "imagePolicy": "Never"}))
    assert manifests.key(deployment) not in {manifests.key(one) for one in namespace.get("deployments")["items"]}
