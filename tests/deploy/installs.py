"""Installations as lists of objects: from kustomize's files, and from the chart if helm is available.

Patches are applied by a few lines of Python, so the tests do not need kustomize. If it is available, a test compares
the results.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy import manifests

Document = dict[str, Any]

POD_KINDS = {"Deployment", "StatefulSet", "Job", "CronJob"}

RENDERED: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "all-on": (
        'tls={"secretName":"edge","clientAuth":"require"}',
        'auth={"mode":"required","serviceAccounts":"keys","grants":{"a":{"role":"read","models":["*"],"to":["everyone"]}}}',
        'service={"managementPort":8034}',
        'networkPolicy={"egress":{"enabled":true}}',
        'monitoring={"serviceMonitor":true,"podMonitor":true,"rules":true,"dashboard":true}',
        'router={"autoscaling":{"enabled":true},"podAnnotations":{"a":"b"},"extraEnv":[{"name":"X","value":"y"}],'
        '"dataPlane":{"config":{"rpcConfigs":{"a.B/c":{"idExtractionPath":[1]}},"allowOtherRpcs":true}}}',
        'pools=[{"name":"cpu","autoscaling":{"enabled":true},"claims":["one","two"]},'
        '{"name":"gpu","gpu":{"count":2},"runtimeClassName":"nvidia","zone":"z","disk":{"kind":"ephemeral"}},'
        '{"name":"other","server":{"image":"example.com/other:1","types":["other"],"spi":"unix:/run/other/spi.sock"}},'
        '{"name":"ml","preset":"mlserver","allowCode":true},'
        '{"name":"triton","preset":"triton","gpu":{"count":1}},'
        '{"name":"torch","preset":"torchserve","allowCode":true}]',
        'proxy={"http":"http://proxy:3128","https":"http://proxy:3128","noProxy":"example.com"}',
        'caBundle={"configMap":"ca"}',
        'imagePullSecrets=[{"name":"registry"}]',
        'priorityClassName="high"',
    ),
    "all-off": (
        'internalTLS={"enabled":false}',
        'auth={"mode":"off"}',
        'networkPolicy={"enabled":false}',
        'monitoring={"annotations":false}',
        'serviceAccount={"create":false,"name":"mine"}',
        'service={"headless":false}',
        'router={"disruptionBudget":null,"preStopSeconds":0}',
        'etcd={"members":1,"storage":{"kind":"emptyDir"},"snapshots":{"enabled":false}}',
        'podSecurity={"runAsUser":null,"runAsGroup":null,"fsGroup":null}',
    ),
    "external-etcd": (
        'etcd={"embedded":false}',
        'internalTLS={"existingSecret":"mine"}',
        'auth={"existingSecret":"keys","serviceAccounts":"review"}',
        'networkPolicy={"egress":{"enabled":true,"etcd":[{"to":[{"ipBlock":{"cidr":"10.0.0.0/8"}}],"ports":[{"port":2379}]}]}}',
    ),
}
"""Values that are rendered with helm, by name."""

PATCHED = ("base", *manifests.COMPONENTS)
"""Results of kustomize: the base, and the overlay of each component."""

needs_helm = pytest.mark.skipif(
    manifests.helm() is None,
    reason="NOT CHECKED: there is no helm ($HELM, PATH, .cache/bin); the chart was not rendered",
)

ALL = [pytest.param(("kustomize", name), id=f"kustomize-{name}") for name in PATCHED] + [
    pytest.param(("helm", name), id=f"helm-{name}", marks=needs_helm) for name in RENDERED
]


def load(which: tuple[str, str]) -> list[Document]:
    """Loads the objects of one of `ALL`."""
    return copy.deepcopy(_loaded(*which))


@functools.cache
def _loaded(way: str, name: str) -> list[Document]:
    return patched(name) if way == "kustomize" else rendered(*RENDERED[name])


def rendered(*sets: str, values: str = "", namespace: str = manifests.NAMESPACE) -> list[Document]:
    """Returns the chart's rendered objects."""
    return copy.deepcopy(_rendered(sets, values, namespace))


@functools.cache  # a second each, and many tests want the same
def _rendered(sets: tuple[str, ...], values: str, namespace: str) -> list[Document]:
    files = [manifests.VALUES / values] if values else []
    return manifests.documents(manifests.render(*files, sets=sets, namespace=namespace))


def read(path: str) -> Any:
    return yaml.load((manifests.KUSTOMIZE / path).read_text(), manifests.LOADER)


def read_all(path: str) -> list[Document]:
    return list(yaml.load_all((manifests.KUSTOMIZE / path).read_text(), manifests.LOADER))


def patched(name: str, *more: str) -> list[Document]:
    """Returns the base with these components, or the base alone."""
    found = [one for file in read("base/kustomization.yaml")["resources"] for one in read_all(f"base/{file}")]
    for component in (name, *more) if name != "base" else more:
        found = _component(component, found)
    return found


def _component(name: str, found: list[Document]) -> list[Document]:
    kustomization = read(f"components/{name}/kustomization.yaml")
    for file in kustomization.get("resources", ()):
        found += read_all(f"components/{name}/{file}")
    for patch in kustomization.get("patches", ()):
        what = yaml.safe_load(patch["patch"])
        if isinstance(what, dict):
            assert what["$patch"] == "delete"
            gone = [one for one in found if manifests.key(one) == manifests.key(what)]
            assert len(gone) == 1, f"{name} deletes {manifests.key(what)}, of which there are {len(gone)}"
            found = [one for one in found if one is not gone[0]]
            continue
        targets = [one for one in found if _is_target(patch["target"], one)]
        assert targets, f"{name} patches what is not there: {patch['target']}"
        for one in targets:
            for operation in what:
                apply(operation, one)
    return found


def _is_target(target: Document, document: Document) -> bool:
    if (
        target["kind"] != document["kind"]
        or target.get("name", document["metadata"]["name"]) != document["metadata"]["name"]
    ):
        return False
    wanted = dict(text.split("=") for text in target.get("labelSelector", "").split(",") if text)
    return wanted.items() <= document["metadata"].get("labels", {}).items()


def apply(operation: Document, document: Document) -> None:
    """Applies one operation of a JSON patch, in place."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    where: Any = document
    for part in way:
        where = where[int(part)] if isinstance(where, list) else where[part]
    place: Any = last if isinstance(where, dict) or last == "-" else int(last)
    if operation["op"] == "remove":
        del where[place]
    elif last == "-":
        where.append(copy.deepcopy(operation["value"]))
    else:
        there = isinstance(where, list) or place in where
        assert there == (operation["op"] == "replace"), operation
        where[place] = copy.deepcopy(operation["value"])


def pods(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """Yields every pod template with a name for messages."""
    for one in found:
        if one["kind"] not in POD_KINDS:
            assert "template" not in one.get("spec", {}), f"{manifests.key(one)}: unknown, and seems to have pods"
            continue
        spec = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else one["spec"]
        yield "/".join(manifests.key(one)), spec["template"]


def containers(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """Yields every container with a name for messages."""
    for name, pod in pods(found):
        for one in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
            yield f"{name}/{one['name']}", one


def one(found: list[Document], kind: str, name: str) -> Document:
    """Returns the object of this kind and name."""
    (document,) = [one for one in found if manifests.key(one) == (kind, name)]
    return document


def env(container: Document) -> dict[str, Any]:
    """Returns the environment of a container: each value's text, or the source of the value."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container.get("env", ())}
