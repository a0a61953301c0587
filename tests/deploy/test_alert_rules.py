"""The alerts, evaluated by Prometheus' own `promtool test rules`. Each alert fires for its fault and names the right
namespace. It fires neither too early nor without the fault. `test_monitoring` checks the expressions alone."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests

ROOT = Path(__file__).parents[2]
NAMESPACE = "a"
TEXT = (manifests.CHART / "files" / "alerts.yaml").read_text()
RULES = yaml.safe_load(TEXT.replace("%NAMESPACE%", NAMESPACE).replace("%RUNBOOKS%", "docs/alerts.md"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


@dataclass(frozen=True)
class Case:
    """Series with a value per minute that make one alert fire, and series that do not. Each gets the labels namespace
    and pod."""

    alert: str
    bad: dict[str, str]
    good: dict[str, str]
    labels: tuple[str, ...] = ("namespace",)
    minutes: int = 90  # long enough for every `for` of the alerts
    more: tuple[tuple[str, str], ...] = ()  # labels besides namespace and pod


API = "modelmesh_api_request_milliseconds_count"
AGE = "modelmesh_age_at_eviction_milliseconds_bucket"
POD = ("namespace", "pod")

CASES = [
    Case("MeshNoRouter", {"mesh_workers": "0x120"}, {"mesh_workers": "2x120"}),
    Case("MeshNoRouter", {}, {"mesh_workers": "2x120"}),
    Case("MeshNoPods", {"mesh_pods": "0x120"}, {"mesh_pods": "1x120"}),
    Case(
        "MeshRegistryStale", {"mesh_registry_stale_seconds": "100x120"}, {"mesh_registry_stale_seconds": "1x120"}, POD
    ),
    Case("MeshPodNotPublished", {"mesh_published": "0x120"}, {"mesh_published": "1x120"}, POD),
    Case("MeshNoLeader", {"mesh_leader": "0x120"}, {"mesh_leader": "1x120"}),
    Case(
        "MeshErrors",
        {f'{API}{{code="OK"}}': "0+100x120", f'{API}{{code="INTERNAL"}}': "0+10x120"},
        {f'{API}{{code="OK"}}': "0+100x120", f'{API}{{code="NOT_FOUND"}}': "0+100x120"},
    ),
    Case("MeshLoadsFail", {"modelmesh_loadmodel_failure": "0+6x120"}, {"modelmesh_loadmodel_failure": "0+1x120"}, POD),
    Case("MeshServerDies", {"mesh_server_deaths": "0+1x120"}, {"mesh_server_deaths": "0x60 1x60"}, POD),
    Case(
        "MeshThrashing",
        {"mesh_evictions": "0+60x120", f'{AGE}{{le="60000"}}': "0+60x120", f'{AGE}{{le="+Inf"}}': "0+60x120"},
        {
            "mesh_evictions": "0+60x120",
            f'{AGE}{{le="60000"}}': "0x120",
            f'{AGE}{{le="3600000"}}': "0+60x120",
            f'{AGE}{{le="+Inf"}}': "0+60x120",
        },
    ),
    Case(
        "MeshLoadsRefused",
        {'mesh_load_refusals{reason="memory"}': "0+60x120"},
        {'mesh_load_refusals{reason="memory"}': "0+1x120"},
        ("namespace",),
        more=(("reason", "memory"),),
    ),
    Case("MeshWorkersRestart", {"mesh_worker_restarts": "0+1x120"}, {"mesh_worker_restarts": "0x60 1x60"}, POD),
    Case("MeshSuspectPods", {"mesh_suspect_pods": "1x120"}, {"mesh_suspect_pods": "0x120"}),
    Case(
        "MeshEtcdFull",
        {"etcd_mvcc_db_total_size_in_bytes": "90x120", "etcd_server_quota_backend_bytes": "100x120"},
        {"etcd_mvcc_db_total_size_in_bytes": "50x120", "etcd_server_quota_backend_bytes": "100x120"},
        POD,
    ),
    Case("MeshEtcdNoLeader", {"etcd_server_has_leader": "0x120"}, {"etcd_server_has_leader": "1x120"}),
    Case(
        "MeshProcessesHang",
        {'mesh_hung_processes{process="worker",reason="stopped"}': "0+1x120"},
        {'mesh_hung_processes{process="worker",reason="stopped"}': "0x60 1x60"},
        POD,
        more=(("process", "worker"), ("reason", "stopped")),
    ),
    *(
        Case(
            alert,
            {f"mesh_{which}_certificate_expires_seconds": bad},
            {f"mesh_{which}_certificate_expires_seconds": good},
            POD,
        )
        for which in ("edge", "internal")
        for alert, bad, good in (
            ("MeshCertificateExpires", "1000000x120", "2000000x120"),
            ("MeshCertificateExpired", "-5x120", "1000000x120"),
        )
    ),
    Case(
        "MeshCertificateRefused",
        {"mesh_edge_certificate_refused": "1x120"},
        {"mesh_edge_certificate_refused": "0x120"},
        POD,
    ),
]


def series(name: str, namespace: str) -> str:
    """Returns a name with the labels namespace and pod, which Prometheus adds when it scrapes."""
    bare, _, labels = name.rstrip("}").partition("{")
    return f'{bare}{{namespace="{namespace}",pod="p"{"," + labels if labels else ""}}}'


def expected(case: Case) -> dict[str, Any]:
    """Returns the alert as promtool expects it, with its labels and its filled-in texts."""
    rule = ALERTS[case.alert]
    labels = {"namespace": NAMESPACE, "pod": "p"}
    labels = {name: labels[name] for name in case.labels} | dict(case.more)

    def filled(text: str) -> str:
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)

    return {
        "exp_labels": {**labels, **rule["labels"]},
        "exp_annotations": {key: filled(text) for key, text in rule["annotations"].items()},
    }


def document() -> dict[str, Any]:
    """Builds promtool's input. Each case runs with its bad series, and with good series beside bad ones of another
    namespace."""
    tests = []
    for case in CASES:
        asked: list[dict[str, Any]] = [
            {"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": [expected(case)]}
        ]
        if "for" in ALERTS[case.alert]:
            asked.insert(0, {"eval_time": "30s", "alertname": case.alert, "exp_alerts": []})
        bad = [{"series": series(name, NAMESPACE), "values": values} for name, values in case.bad.items()]
        good = [{"series": series(name, NAMESPACE), "values": values} for name, values in case.good.items()]
        good += [{"series": series(name, "b"), "values": values} for name, values in case.bad.items()]
        tests += [
            {"interval": "1m", "input_series": bad, "alert_rule_test": asked},
            {
                "interval": "1m",
                "input_series": good,
                "alert_rule_test": [{"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": []}],
            },
        ]
    return {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}


def test_every_alert_has_a_case() -> None:
    assert {case.alert for case in CASES} == set(ALERTS)


def promtool() -> str | None:
    """Returns promtool from $PROMTOOL, PATH or .cache/bin, or None if there is none."""
    return (
        os.environ.get("PROMTOOL")
        or shutil.which("promtool")
        or shutil.which("promtool", path=str(ROOT / ".cache/bin"))
    )


@pytest.mark.skipif(
    promtool() is None,
    reason="NOT CHECKED: there is no promtool ($PROMTOOL, PATH, .cache/bin); no alert was evaluated",
)
def test_alerts_fire(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(json.dumps(RULES))
    (tmp_path / "test.yaml").write_text(json.dumps(document()))
    program = promtool()
    assert program is not None
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "test.yaml"]):
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
