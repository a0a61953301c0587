"""Identities: the cluster's own authority, certificates for its parts, and kubeconfigs that hold them.

Certificates are valid for a month and renewed after a fortnight at the next start. A cluster can therefore run for at
least two weeks before they expire. Each kubeconfig is a self-contained file that can be passed around.
"""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from deploy.cluster import layout

_DAY = 86400.0
_FRESH = 14 * _DAY
_VALID = "30"  # days


def make() -> None:
    """Makes certificates unless fresh ones exist, and writes the kubeconfigs."""
    authority = layout.PKI / "ca.crt"
    marker = layout.PKI / "complete"
    if not marker.exists() or time.time() - marker.stat().st_mtime > _FRESH:
        shutil.rmtree(layout.PKI, ignore_errors=True)
        layout.PKI.mkdir(parents=True)
        layout.PKI.chmod(0o700)
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(layout.PKI / "ca.key"),
                 "-out", str(authority), "-days", _VALID, "-subj", "/CN=mesh-test-authority")  # fmt: skip
        _openssl("genrsa", "-out", str(layout.PKI / "accounts.key"), "2048")
        service = "kubernetes.default.svc"
        _certificate(
            "apiserver",
            "/CN=kube-apiserver",
            [f"IP:{layout.NODE_IP}", f"IP:{layout.API_IP}", "IP:127.0.0.1"]
            + [f"DNS:{name}" for name in ("localhost", "kubernetes.default", service, f"{service}.{layout.DOMAIN}")],
        )
        _certificate("admin", "/O=system:masters/CN=admin", ["DNS:admin"])
        _certificate(
            "kubelet",
            f"/O=system:nodes/CN=system:node:{layout.NODE}",
            [f"DNS:{layout.NODE}", f"IP:{layout.NODE_IP}"],
        )
        marker.touch()
    write(layout.KUBECONFIG, kubeconfig(authority.read_bytes(), user=_user("admin")))
    write(layout.RUN / "kubelet.kubeconfig", kubeconfig(authority.read_bytes(), user=_user("kubelet")))


def kubeconfig(authority: bytes, *, user: dict[str, Any], namespace: str = "default") -> dict[str, Any]:
    """Returns a kubeconfig for this cluster. `user` has a token, or a certificate with its key, in the format of
    kubeconfigs."""
    cluster = {
        "server": f"https://{layout.NODE_IP}:{layout.API_PORT}",
        "certificate-authority-data": base64.b64encode(authority).decode(),
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "mesh-test", "cluster": cluster}],
        "users": [{"name": "user", "user": user}],
        "contexts": [
            {"name": "mesh-test", "context": {"cluster": "mesh-test", "user": "user", "namespace": namespace}}
        ],
        "current-context": "mesh-test",
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a document that only the current user may read."""
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1))


def _user(name: str) -> dict[str, str]:
    data = {
        suffix: base64.b64encode((layout.PKI / f"{name}.{suffix}").read_bytes()).decode() for suffix in ("crt", "key")
    }
    return {"client-certificate-data": data["crt"], "client-key-data": data["key"]}


def _certificate(name: str, subject: str, alternatives: list[str]) -> None:
    stem = layout.PKI / name
    extensions = stem.with_suffix(".ext")
    extensions.write_text(f"subjectAltName={','.join(alternatives)}\nextendedKeyUsage=serverAuth,clientAuth\n")
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", subject)
    _openssl("x509", "-req", "-in", f"{stem}.csr", "-CA", str(layout.PKI / "ca.crt"), "-CAkey",
             str(layout.PKI / "ca.key"), "-CAcreateserial", "-days", _VALID, "-out", f"{stem}.crt",
             "-extfile", str(extensions))  # fmt: skip


def _openssl(*argv: str) -> None:
    subprocess.run(["openssl", *argv], check=True, capture_output=True, timeout=60.0)
