"""The chart's values: a schema refuses typos and nonsense, and pools may override what is set for all pools."""

import copy
import json
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from deploy import manifests
from placement import policies
from tests.deploy import installs

SCHEMA = json.loads((manifests.CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((manifests.CHART / "values.yaml").read_text())


def merged(into: Any, values: Any) -> Any:
    """Merges values into the chart's own, as Helm does."""
    if not isinstance(into, dict) or not isinstance(values, dict):
        return values
    result = {**into, **{key: merged(into.get(key), value) for key, value in values.items()}}
    return {key: value for key, value in result.items() if not (key in values and values[key] is None)}


def refusals(values: dict[str, Any]) -> list[str]:
    """Returns the schema's errors for values."""
    errors = jsonschema.Draft7Validator(SCHEMA).iter_errors(merged(copy.deepcopy(DEFAULTS), values))
    found = []
    for error in errors:
        found += [one.message for one in error.context or [error]]
    return found


def at(path: str, value: Any) -> dict[str, Any]:
    """Returns nested dicts with the value at a dotted path."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def maps(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from maps(value, f"{path}.{key}" if path else key)


def test_defaults():
    """The chart's default values are valid, and so are the values files next to it."""
    assert refusals({}) == []
    for file in manifests.VALUES.glob("*.yaml"):
        assert refusals(yaml.safe_load(file.read_text())) == [], file.name


OPEN = {
    "grants",
    "nodeSelector",
    "affinity",
    "podLabels",
    "podAnnotations",
    "annotations",
    "labels",
    "requests",
    "limits",
}
"""Objects whose keys are chosen by the admin, or are those of resources."""


@pytest.mark.parametrize("path", [path for path, _ in maps(DEFAULTS) if path.rpartition(".")[2] not in OPEN])
def test_typo(path: str):
    """A misspelled key is refused at every level, and the error names it."""
    said = refusals(merged(at(path, {}) if path else {}, at(f"{path}.typpo" if path else "typpo", 1)))
    assert any("typpo" in text for text in said), said


def test_typo_in_pool():
    """A misspelled key is also refused in a pool and in resources."""
    assert any("replics" in text for text in refusals({"pools": [{"name": "a", "replics": 1}]}))
    pool = {"name": "a", "resources": {"limits": {"memori": "1Gi"}}}
    assert any("memori" in text for text in refusals({"pools": [pool]}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("auth.mode", "on"),
        ("auth.mode", True),
        ("auth.serviceAccounts", "tokens"),
        ("auth.grants", {"a": {"role": "root", "models": ["*"], "to": ["everyone"]}}),
        ("auth.grants", {"a/b": {"role": "read", "models": ["*"], "to": ["everyone"]}}),
        ("auth.grants", {"a": {"role": "read", "models": ["*"], "to": ["everyone"], "until": 1}}),
        ("etcd.members", 2),
        ("etcd.quota", "lots"),
        ("etcd.storage.kind", "hostPath"),
        ("image.digest", "latest"),
        ("image.pullPolicy", "always"),
        ("logLevel", "verbose"),
        ("networkPolicy.clients", [{"podselector": {}}]),
        ("pools", []),
        ("pools", [{"replicas": 2}]),
        ("pools", [{"name": "Big"}]),
        ("pools", [{"name": "a", "disk": {"size": "10GB"}}]),
        ("router.replicas", "two"),
        ("runtime.eviction", "lfu"),
        ("runtime.name", "a"),
        ("service.name", "Mesh.svc"),
        ("tls.clientAuth", "required"),
    ],
)
def test_nonsense(path: str, value: Any):
    assert refusals(at(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("router.replicas", None),
        ("router.disruptionBudget", None),
        ("pools", [{"name": "a", "replicas": None, "resources": {"limits": {"cpu": 2}}}]),
        ("networkPolicy.clients", [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]),
        ("etcd.members", 1),
        ("auth.mode", "off"),
        ("auth.mode", False),
    ],
)
def test_sense(path: str, value: Any):
    assert refusals(at(path, value)) == []


def test_strict():
    """Wherever the schema lists an object's keys, it refuses all others."""
    loose = [
        path
        for path, node in maps(SCHEMA)
        if "properties" in node
        and isinstance(node["properties"], dict)
        and node.get("additionalProperties") is not False
    ]
    assert [path for path in loose if not path.endswith("properties")] == []


def test_every_key_is_in_both():
    """Schema and values have the same keys, so there are no hidden settings."""

    def shown(node: Any) -> Any:
        return {key: shown(value) for key, value in node.items()} if isinstance(node, dict) and node else {}

    def known(node: dict[str, Any]) -> Any:
        if "$ref" in node:
            return known(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
        if "allOf" in node:
            return known(node["allOf"][0])
        return {key: known(value) for key, value in node.get("properties", {}).items()}

    def compare(values: Any, schema: Any, path: str) -> None:
        for key in values:
            assert key in schema or not schema, f"{path}.{key}"
        for key in schema:
            if key in {"name", "ephemeral-storage", "global"} and key not in values:
                continue  # a pool's name; what Helm or Kubernetes add
            if path.endswith((".image", ".dataPlane.config")) and not values:
                continue  # a pool's own image: the keys of the image above; a document: those of docs/servers.md
            assert key in values, f"{path}.{key}"
            compare(values[key], schema[key], f"{path}.{key}")

    compare(shown(DEFAULTS), known(SCHEMA), "")


def test_versions():
    """The chart and the image that it installs have the project's version."""
    chart = yaml.safe_load((manifests.CHART / "Chart.yaml").read_text())
    project = tomllib.loads((manifests.ROOT.parent / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_eviction_policies_are_those_there_are():
    """The schema lists exactly the eviction policies that exist. A pod with any other policy would end at once."""
    assert SCHEMA["$defs"]["pool"]["properties"]["eviction"]["enum"] == list(policies.NAMES)
    assert policies.check(DEFAULTS["runtime"]["eviction"])


MAY_BE_NULL = {"server", "replicas", "disruptionBudget", "runAsUser", "runAsGroup", "fsGroup"}
"""Keys for which the values define a meaning of null."""


def settings(node: Any = DEFAULTS, path: str = "") -> Iterator[str]:
    """Yields the paths of all settings, and of the objects that contain them, except within resources and budgets."""
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        yield here
        if isinstance(value, dict) and key not in {"resources", "agentResources", "disruptionBudget"}:
            yield from settings(value, here)


@pytest.mark.parametrize("path", list(settings()))
def test_null_is_refused_unless_it_means_something(path: str):
    """Null is refused unless it has a meaning. Helm takes it as "missing", so a template would fail or silently render
    nothing."""
    said = refusals(at(path, None))
    key = path.rpartition(".")[2]
    if key in MAY_BE_NULL:
        assert said == []
    else:
        assert any(repr(key) in text and "required" in text for text in said), said


@installs.needs_helm
@pytest.mark.parametrize(
    ("sets", "words"),
    [
        pytest.param(['router={"replcas":3}'], ["router", "replcas"], id="typo"),
        pytest.param(['pools=[{"name":"a","replcas":3}]'], ["pools", "replcas"], id="typo-in-pool"),
        pytest.param(["podSecurity=null"], ["podSecurity"], id="null"),
        pytest.param(["pools=null"], ["pools"], id="null-pools"),
        pytest.param(['runtime={"eviction":"lfu"}'], ["eviction", "gdsf"], id="policy"),
        pytest.param(['pools=[{"name":"a"},{"name":"a"}]'], ["two pools", '"a"'], id="same-name"),
        pytest.param(
            ['pools=[{"name":"a","rollout":{"maxSurge":0}}]'], ["maxSurge", "maxUnavailable", "both 0"], id="no-rollout"
        ),
        pytest.param(
            ['pools=[{"name":"a","autoscaling":{"enabled":true,"minReplicas":5,"maxReplicas":2}}]'],
            ["minReplicas", "maxReplicas", '"a"'],
            id="hpa",
        ),
        pytest.param(
            ['router={"dataPlane":{"config":{"allowOtherRpcs":true},"configMap":"mine"}}'],
            ["router.dataPlane", "both", '"mine"'],
            id="two-dataplanes",
        ),
        pytest.param(
            ['router={"dataPlane":{"config":{"rpcConfigs":{"a.B/c":{"idExtractionPath":[0]}}}}}'],
            ["idExtractionPath", "minimum"],
            id="no-field",
        ),
        pytest.param(['etcd={"storage":{"kind":"emptyDir"}}'], ["emptyDir", "etcd.members=1"], id="three-without-disk"),
        pytest.param(['tls={"clientAuth":"require"}'], ["tls.clientAuth", "tls.secretName"], id="clients-without-tls"),
        pytest.param(['internalTLS={"days":30}'], ["renewBeforeDays"], id="never-fresh"),
        pytest.param(
            ['auth={"mode":"off","serviceAccounts":"keys"}'],
            ["auth.serviceAccounts", "auth.mode"],
            id="tokens-when-off",
        ),
    ],
)
def test_helm_refuses(sets: list[str], words: list[str]):
    """If Helm refuses values, the error names those at fault."""
    with pytest.raises(manifests.Failed) as caught:
        installs.rendered(*sets)
    for word in words:
        assert word in str(caught.value)


@installs.needs_helm
def test_jobs_take_their_settings():
    """Settings for pods apply to the pods of all Jobs too. Otherwise a LimitRange, a node's taint or a sidecar injector
    could keep them from starting or ending."""
    jobs = {
        "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "1Gi"}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "priorityClassName": "low",
        "podLabels": {"sidecar.istio.io/inject": "false"},
        "podAnnotations": {"linkerd.io/inject": "disabled"},
    }
    found = installs.rendered(f"jobs={json.dumps(jobs)}")
    kinds = [one for one in found if one["kind"] in ("Job", "CronJob")]
    assert sorted(one["kind"] for one in kinds) == ["CronJob", "CronJob", "Job", "Job"]
    pods = [pod for _, pod in installs.pods(kinds)]
    assert len(pods) == 4
    for pod in pods:
        labels = pod["metadata"]["labels"]
        assert labels.items() >= {"app.kubernetes.io/name": "mesh", **jobs["podLabels"]}.items()
        assert pod["metadata"]["annotations"] == jobs["podAnnotations"]
        spec = pod["spec"]
        assert (spec["nodeSelector"], spec["tolerations"]) == (jobs["nodeSelector"], jobs["tolerations"])
        assert spec["priorityClassName"] == "low"
        (container,) = spec["containers"]
        assert container["resources"]["requests"] == {"cpu": "100m", "memory": "128Mi"}
        assert container["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}


@installs.needs_helm
def test_falsy_overrides():
    """A pool may override a common setting with 0, null or an empty value."""
    found = installs.rendered(
        'runtime={"replicas":4,"labels":["x"],"zone":"z","nodeSelector":{"a":"b"}}',
        'pools=[{"name":"a","replicas":0,"labels":[],"zone":"","disruptionBudget":null},{"name":"b","replicas":null}]',
    )
    a = installs.one(found, "Deployment", "mesh-runtime-a")
    env = installs.env(a["spec"]["template"]["spec"]["containers"][0])
    assert (a["spec"]["replicas"], env["MESH_LABELS"]) == (0, "")
    assert "fieldRef" in env["MESH_ZONE"]
    assert a["spec"]["template"]["spec"]["nodeSelector"] == {"a": "b"}
    b = installs.one(found, "Deployment", "mesh-runtime-b")
    assert "replicas" not in b["spec"]
    assert installs.env(b["spec"]["template"]["spec"]["containers"][0])["MESH_ZONE"] == "z"
    budgets = {one["metadata"]["name"] for one in found if one["kind"] == "PodDisruptionBudget"}
    assert budgets == {"mesh-router", "mesh-etcd", "mesh-runtime-b"}


@installs.needs_helm
def test_resources_are_merged():
    """A pool that sets only its memory keeps the CPUs that are set for all pools."""
    found = installs.rendered('pools=[{"name":"a","resources":{"limits":{"memory":"9Gi"}},"gpu":{"count":1}}]')
    container = installs.one(found, "Deployment", "mesh-runtime-a")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "9Gi", "nvidia.com/gpu": "1"}


@installs.needs_helm
@pytest.mark.parametrize(
    ("sets", "cpu", "gpu"),
    [
        pytest.param([], "mesh:{v}", "mesh-gpu:{v}", id="plain"),
        pytest.param(['image={"registry":"r:5000/","tag":"1"}'], "r:5000/mesh:1", "r:5000/mesh-gpu:1", id="registry"),
        pytest.param(
            [f'image={{"digest":"sha256:{"a" * 64}"}}'], f"mesh@sha256:{'a' * 64}", "mesh-gpu:{v}", id="digest"
        ),
    ],
)
def test_image(sets: list[str], cpu: str, gpu: str):
    """The image is set by tag or by digest. A GPU pool uses the tag of the GPU repository even if there is a digest,
    which is that of the other image."""
    version = yaml.safe_load((manifests.CHART / "Chart.yaml").read_text())["appVersion"]
    found = installs.rendered('pools=[{"name":"cpu"},{"name":"gpu","gpu":{"count":1}}]', *sets)
    images = {name: container["image"] for name, container in installs.containers(found)}
    assert images.pop("Deployment/mesh-runtime-gpu/runtime") == gpu.format(v=version)
    assert set(images.values()) == {cpu.format(v=version)}
