"""Alerts and dashboard: they use only metrics that exist, and alerts say what to do."""

import ast
import itertools
import json
import re
from typing import Any

import pytest
import yaml

from deploy import manifests
from tests.deploy import installs

ROOT = manifests.ROOT.parent
RUNBOOKS = (ROOT / "docs" / "alerts.md").read_text()
DASHBOARD = json.loads((manifests.CHART / "files" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((manifests.CHART / "files" / "alerts.yaml").read_text())

FOREIGN = {
    "etcd_mvcc_db_total_size_in_bytes": "gauge",
    "etcd_server_has_leader": "gauge",
    "etcd_server_quota_backend_bytes": "gauge",
}
"""Metrics of etcd itself."""

FUNCTIONS = {
    *(
        "absent",
        "and",
        "avg",
        "by",
        "count",
        "label_replace",
        "histogram_quantile",
        "increase",
        "label_values",
        "max",
        "min",
        "on",
        "or",
    ),
    *("rate", "sum", "topk", "vector"),
}
KINDS = {"counter", "gauge", "histogram"}
LABELS = {"namespace", "pod", "le"}  # the labels that Prometheus adds when it scrapes, and a histogram's own


def metrics() -> dict[str, tuple[str, set[str]]]:
    """Returns kind and labels of every metric that the sources define, by name."""
    found: dict[str, tuple[str, set[str]]] = {name: (kind, set()) for name, kind in FOREIGN.items()}
    for package in ("mesh", "router"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found.update(_defined(node))
    return found


def _defined(node: ast.AST) -> dict[str, tuple[str, set[str]]]:
    if isinstance(node, ast.Call) and node.args:
        # registry.gauge("mesh_...", "Help.", labels), or a name for that method.
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0]
        if called in KINDS and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return {name.value: (called, _labels(node, called))}
    if isinstance(node, ast.Dict):
        # {"name": "mesh_...", "type": "gauge", ...}: a snapshot.
        plain = {
            key.value: value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
        }
        name, kind = plain.get("name"), plain.get("type")
        if isinstance(name, ast.Constant) and isinstance(kind, ast.Constant):
            return {str(name.value): (str(kind.value), _texts(plain.get("labels")))}
    if isinstance(node, ast.Tuple):
        # ("mesh_...", "gauge", ...): a list of them, as the process's and Envoy's are.
        texts = [one.value for one in node.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        for name_text, kind_text in itertools.pairwise(texts):
            if kind_text in KINDS and re.fullmatch(r"[a-z_]+", name_text):
                return {name_text: (kind_text, {"process"} if name_text.startswith("process_") else set())}
    return {}


def _labels(call: ast.Call, kind: str) -> set[str]:
    place = 3 if kind == "histogram" else 2
    given = call.args[place] if len(call.args) > place else None
    if isinstance(given, ast.Name):
        return {"method", "code"}  # the one tuple with a name
    return _texts(given)


def _texts(node: ast.AST | None) -> set[str]:
    if not isinstance(node, (ast.Tuple, ast.List)):
        return set()
    return {str(one.value) for one in node.elts if isinstance(one, ast.Constant)}


METRICS = metrics()


def targets() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """Returns the names of the metrics in a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", expression)
    bare = re.sub(r"\b(by|on|without)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"[a-z_][a-z0-9_]*", bare)) - FUNCTIONS


def check(expression: str) -> None:
    """Checks that every metric in an expression exists, suits its use, and has the labels that are used."""
    assert expression.count("(") == expression.count(")")
    found = names(expression)
    assert found, expression
    labels = set(re.findall(r'label_replace\([^"]*\{[^}]*\}, "([a-z_]+)"', expression))
    for name in found:
        known = name
        for suffix in ("_bucket", "_sum", "_count"):
            if name not in METRICS and name.endswith(suffix):
                known = name.removesuffix(suffix)
                assert METRICS.get(known, ("",))[0] == "histogram", f"{name}: no histogram"
        assert known in METRICS, f"{name}: no such metric"
        kind, own = METRICS[known]
        labels |= own
        if kind != "gauge":
            assert re.search(rf"(rate|increase)\({name}", expression), f"{name} is a counter, so it needs rate()"
        else:
            assert not re.search(rf"(rate|increase)\({name}", expression), f"{name} is a gauge"
    for inside in re.findall(r"\{([^}]*)\}", expression):
        for label in re.findall(r"([a-z_]+)\s*=", inside):
            assert label in labels | LABELS, f"{label} in {expression}"
        assert "namespace=" in inside, f"{expression}: not limited to the namespace"
    for inside in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        for label in re.findall(r"[a-z_]+", inside):
            assert label in labels | LABELS, f"{label} in {expression}"


def test_metrics_are_found():
    """Metrics of every kind are found in the sources: counters, gauges, histograms with labels, and those of Envoy and
    of processes."""
    assert METRICS["mesh_evictions"] == ("counter", set())
    assert METRICS["mesh_load_refusals"] == ("counter", {"reason"})
    assert METRICS["mesh_pods"] == ("gauge", set())
    assert METRICS["modelmesh_api_request_milliseconds"] == ("histogram", {"method", "code"})
    assert METRICS["modelmesh_invoke_model_milliseconds"] == ("histogram", {"method", "code"})
    assert METRICS["mesh_edge_connections"] == ("gauge", set())
    assert METRICS["process_resident_memory_bytes"] == ("gauge", {"process"})


@pytest.mark.parametrize("expression", targets())
def test_panels(expression: str):
    """Every metric in a panel exists."""
    check(expression)


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in rules()])
def test_alerts(rule: dict[str, Any]):
    """Every metric in an alert exists. The alert has a summary, an action, a severity and a section among the runbooks,
    and its texts use only labels that its expression keeps."""
    check(rule["expr"])
    assert set(rule["annotations"]) == {"summary", "action", "runbook_url"}
    page, _, place = rule["annotations"]["runbook_url"].partition("#")
    assert (page, place) == ("%RUNBOOKS%", rule["alert"].lower())
    assert f"\n## {rule['alert']}\n" in RUNBOOKS, "the alert is explained where its link points to"
    assert rule["labels"]["severity"] in ("warning", "critical")
    for label in re.findall(r"\$labels\.([a-z_]+)", str(rule["annotations"])):
        assert label in LABELS | {"reason", "process"}
        assert label in kept(rule["expr"]), f"the text uses {label}, which is aggregated away"


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in rules()])
def test_alerts_keep_their_namespace(rule: dict[str, Any]):
    """Alerts keep their namespace label, because operators of several meshes must see which mesh is meant."""
    assert "namespace" in kept(rule["expr"])


def kept(expression: str) -> set[str]:
    """Returns the labels that every result of an expression is sure to have, for the part of PromQL that the rules use.

    An aggregation keeps the labels in its `by`. Functions and comparisons keep those of their input, and `absent` those
    of a plain selector. `or` keeps the labels that both sides have; `and` and arithmetic keep those of the left side.
    """
    everything = {"namespace", "pod", "process", "reason", "code", "le"}
    text = re.sub(r"\[[^]]*\]", "", re.sub(r'"[^"]*"', '""', " ".join(expression.split())))

    def top(separators: str, text: str) -> list[str]:
        """Splits a text at the separators that are outside of all parentheses."""
        parts, depth, start = [], 0, 0
        for match in re.finditer(rf"[({{]|[)}}]|{separators}", text):
            if match[0] in "({":
                depth += 1
            elif match[0] in ")}":
                depth -= 1
            elif not depth:
                parts.append(text[start : match.start()])
                start = match.end()
        return [*parts, text[start:]]

    def of(text: str) -> set[str]:
        text = text.strip()
        sides = top(r"\bor\b", text)
        if len(sides) > 1:
            return set.intersection(*(of(side) for side in sides))
        left = top(r"\band\b|[<>=!]=?|[*/+-]", text)[0].strip()
        if left != text:
            return of(left) if not re.fullmatch(r"[0-9.]+", left) else everything
        if (
            found := re.fullmatch(r"(?:sum|max|min|avg|count|topk)\s*(?:by\s*\(([^)]*)\))?\s*\((.*)\)", text)
        ) is not None:
            return of(found[2]) & set(re.findall(r"[a-z_]+", found[1] or ""))
        if (found := re.fullmatch(r"absent\((.*)\)", text)) is not None:
            plain = re.fullmatch(r"[a-z_:]+\{([^}]*)\}", found[1].strip())
            return set(re.findall(r'([a-z_]+)=""', plain[1])) if plain is not None else set()
        if (found := re.fullmatch(r"[a-z_]+\((?:[0-9.]+,)?(.*)\)", text)) is not None:
            return of(found[1])
        if (found := re.fullmatch(r"\((.*)\)", text)) is not None:
            return of(found[1])
        assert re.fullmatch(r"[a-z_:]+\{[^}]*\}", text), f"cannot be read: {text}"
        return everything

    return of(text)


@pytest.mark.parametrize(
    ("expression", "labels"),
    [
        ('absent(mesh_workers{namespace="a"} > 0)', set()),
        ('absent(mesh_workers{namespace="a"})', {"namespace"}),
        ('max(mesh_pods{namespace="a"}) == 0', set()),
        ('sum by (pod) (rate(mesh_x{namespace="a"}[5m])) > 0.1', {"pod"}),
        ('sum by (namespace) (a_b{x="y"}) > 2 * sum(c_d{x="y"})', {"namespace"}),
        ('sum by (namespace) (a_b{x="y"}) or sum(c_d{x="y"})', set()),
        ('max by (pod, namespace) (a_b{x="y"} / c_d{x="y"}) > 0.8', {"pod", "namespace"}),
    ],
)
def test_kept_labels_are_read_rightly(expression: str, labels: set[str]):
    assert kept(expression) == labels


def test_certificates_alert():
    """Every metric of a certificate's expiry is part of a warning and of a critical alert."""
    metrics = {name for name in METRICS if name.endswith("_expires_seconds")}
    assert {"mesh_edge_certificate_expires_seconds", "mesh_internal_certificate_expires_seconds"} <= metrics
    for severity in ("warning", "critical"):
        asked = " ".join(rule["expr"] for rule in rules() if rule["labels"]["severity"] == severity)
        assert metrics <= names(asked), severity


@pytest.mark.parametrize(
    "wrong",
    [
        'sum(mesh_nothing{namespace="a"})',
        'sum(mesh_evictions{namespace="a"})',
        'rate(mesh_pods{namespace="a"}[1m])',
        'sum by (color) (mesh_pods{namespace="a"})',
        "sum(mesh_pods{})",
        'rate(mesh_pods_count{namespace="a"}[1m])',
    ],
)
def test_check_can_fail(wrong: str):
    with pytest.raises(AssertionError):
        check(wrong)


def test_dashboard():
    """The dashboard's rows are questions that admins have. Its panels have unique ids and do not overlap."""
    panels = DASHBOARD["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Is it healthy?",
        "What is hot?",
        "What is thrashing?",
        "Who is slow?",
        "Are more pods needed?",
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_pool_metric():
    """The metric by which pools are scaled exists, and is a gauge."""
    values = yaml.safe_load((manifests.CHART / "values.yaml").read_text())
    assert METRICS[values["runtime"]["autoscaling"]["metric"]][0] == "gauge"


@installs.needs_helm
def test_rendered():
    """The chart renders alerts and dashboard as in the files, for its namespace."""
    found = installs.rendered('monitoring={"rules":true,"dashboard":true}', namespace="team-a")
    dashboard = installs.one(found, "ConfigMap", "mesh-dashboard")
    assert json.loads(dashboard["data"]["mesh.json"]) == DASHBOARD
    rule = installs.one(found, "PrometheusRule", "mesh")
    text = json.dumps(rule["spec"])
    assert "%" not in re.sub(r"\d ?%", "", text)
    text = text.replace('namespace=\\"team-a\\"', 'namespace=\\"%NAMESPACE%\\"')
    assert json.loads(text.replace("docs/alerts.md#", "%RUNBOOKS%#")) == ALERTS


@installs.needs_helm
def test_monitors_find_pods():
    """Monitors select pods and Services that exist, and name ports that these have."""
    found = installs.rendered(*installs.RENDERED["all-on"])
    templates = [pod for _, pod in installs.pods(found)]
    for monitor in (one for one in found if one["kind"] == "PodMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in templates if wanted <= pod["metadata"]["labels"].items()]
        assert chosen
        for pod in chosen:
            names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= names
    (monitor,) = [one for one in found if one["kind"] == "ServiceMonitor"]
    services = [
        one
        for one in found
        if one["kind"] == "Service"
        and monitor["spec"]["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    ]
    ports = {port["name"] for service in services for port in service["spec"]["ports"]}
    assert {one["port"] for one in monitor["spec"]["endpoints"]} <= ports
