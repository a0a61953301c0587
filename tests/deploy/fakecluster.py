"""A read-only Kubernetes API server, just enough for the `lookup` of `helm template --dry-run=server`.

Helm sends the same requests to a real API server, which tests with a cluster use.
"""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {
    "v1": {
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    "apps/v1": {"deployments": "Deployment", "statefulsets": "StatefulSet"},
    "batch/v1": {"cronjobs": "CronJob", "jobs": "Job"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "rbac.authorization.k8s.io/v1": {"rolebindings": "RoleBinding", "roles": "Role"},
}


def secret(name: str, **texts: str) -> dict[str, Any]:
    """Returns a Secret with these texts. The argument `tls_crt` sets the key `tls.crt`."""
    dotted = {"ca_crt": "ca.crt", "tls_crt": "tls.crt", "tls_key": "tls.key"}
    data = {dotted.get(key, key): base64.b64encode(text.encode()).decode() for key, text in texts.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "mesh"}, "data": data}


@contextlib.contextmanager
def serve(objects: list[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """Serves the objects in the namespace `mesh`, which has the account `default`, and yields the path of a
    kubeconfig."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "mesh"}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, answer = find([account, *objects], self.path.split("?")[0])
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        config = folder / "kubeconfig"
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                    "users": [{"name": "fake", "user": {}}],
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": "mesh"}}],
                }
            )
        )
        yield config
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def find(objects: list[dict[str, Any]], path: str) -> tuple[int, dict[str, Any]]:
    """Returns the HTTP status of a GET of `path`, and the answer."""
    if path == "/version":
        return 200, {"major": "1", "minor": "35", "gitVersion": "v1.35.0"}
    if path == "/api":
        return 200, {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": name.partition("/")[0], "versions": [{"groupVersion": name, "version": "v1"}]}
            for name in KINDS
            if "/" in name
        ]
        return 200, {"kind": "APIGroupList", "groups": groups}
    prefix, _, rest = path.partition("/namespaces/mesh/")
    version = prefix.strip("/").partition("/")[2]
    if version in KINDS and not rest:
        resources = [
            {"name": name, "kind": kind, "namespaced": True, "verbs": ["get", "list"]}
            for name, kind in KINDS[version].items()
        ]
        return 200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    kind, _, name = rest.partition("/")
    of_kind = [one for one in objects if one["kind"] == KINDS.get(version, {}).get(kind)]
    if rest and not name:
        return 200, {"apiVersion": version, "kind": KINDS[version][kind] + "List", "items": of_kind}
    for one in of_kind:
        if one["metadata"]["name"] == name:
            return 200, one
    return 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
