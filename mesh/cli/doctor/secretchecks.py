"""Findings about the Secrets that a mesh's workloads name: existence, keys, certificates, documents.

The findings contain a Secret's keys, facts about its certificates, and etcd's endpoints and prefix, but no credentials.
"""

import datetime
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mesh.cli.doctor import certificates
from mesh.cli.doctor.clusterfacts import STORAGE, ClusterFacts, Reference, references
from mesh.cli.doctor.findings import Area, Finding, some
from mesh.options import etcdsecret

AREA = Area("secrets")

CONNECTION = "etcd_connection"

INTERNAL = "mesh-internal"
"""Name of the chart's Secret with the certificate between the mesh's processes."""

CHART_CONNECTION = "mesh-etcd-connection"
"""Name of the chart's Secret with the connection to its own etcd."""

ADMIN_KEY = "mesh-admin-key"
"""Name of the chart's Secret with the admin's key."""

_RENEW = "kubectl create job --from=cronjob/mesh-certificates renew-$(date +%s)"
_MADE = {
    INTERNAL: f"the Job mesh-certificates-... fills this Secret: see its log; to fill it again: {_RENEW}",
    ADMIN_KEY: "the Job mesh-admin-key-... fills this Secret: see its log; "
    "helm upgrade runs it again, five minutes after it has ended",
}
"""What to do about missing entries of the Secrets that Jobs of the chart fill."""


def check(facts: ClusterFacts, now: datetime.datetime) -> list[Finding]:
    """Returns all findings, or none if Secrets could not be read."""
    if facts.secrets is None:
        return []
    found: list[Finding] = []
    needed = list(references(facts.workloads or ()))
    for name in sorted({one.name for one in needed}):
        found += _secret(name, [one for one in needed if one.name == name], facts.secrets.get(name), now)
    found += _connections(needed, facts.secrets)
    if STORAGE in facts.secrets:
        found += _storage(facts.secrets[STORAGE])
    else:
        found.append(AREA.ok("storage", f"there is no Secret {STORAGE}: models come from stores that need no keys"))
    return found


def _secret(
    name: str, needed: list[Reference], data: Mapping[str, bytes] | None, now: datetime.datetime
) -> Iterator[Finding]:
    by = some(sorted({one.volume[0] for one in needed}))
    if data is None:
        if not all(one.optional for one in needed):
            yield AREA.fail(
                "there", f"there is no Secret {name}, and {by} cannot start without it", _creation(name, needed)
            )
        return
    missing = sorted({key for one in needed if not one.optional for key in one.keys} - data.keys())
    if missing:
        todo = _MADE.get(name, "add it; docs/kubernetes.md, Secrets, lists the keys")
        yield AREA.fail("keys", f"the Secret {name} has no key {some(missing)}, and {by} cannot start without it", todo)
    elif name != STORAGE:
        yield AREA.ok("keys", f"the Secret {name} exists, with its keys")
    renew = "renew it in the Secret; pods use the new one without a restart"
    if name == INTERNAL:
        renew = _RENEW
    for key in sorted(data):
        if key.endswith((".crt", ".pem")) and name != STORAGE:
            yield certificates.pem(AREA, "expiry", f"{key} of the Secret {name}", data[key], now, renew)
    if "tls.crt" in data and "tls.key" in data and not _fits(data["tls.crt"], data["tls.key"]):
        text = f"tls.key of the Secret {name} is not the key of its tls.crt"
        yield AREA.fail("keys", text, "put a certificate and its own key into it")


def _creation(name: str, needed: list[Reference]) -> str:
    """Returns the command with which the admin creates a missing Secret."""
    if name == INTERNAL:
        again = f"kubectl create secret generic {name} && {_RENEW}"
        return f"create an empty one, which a Job fills: {again}; running processes accept the new authority"
    if name in (CHART_CONNECTION, ADMIN_KEY):
        return "the chart creates it: helm upgrade with the same values, or kubectl apply -k"
    if any(one.pulls for one in needed):
        return f"create it: kubectl create secret docker-registry {name} --docker-server=... --docker-username=..."
    keys = sorted({key for one in needed if not one.optional for key in one.keys}) or [CONNECTION]
    files = " ".join(f"--from-file={key}" for key in keys)
    return f"create it from these files (docs/kubernetes.md, Secrets): kubectl create secret generic {name} {files}"


def _fits(certificate: bytes, key: bytes) -> bool:
    try:
        private = serialization.load_pem_private_key(key, None)
        public = x509.load_pem_x509_certificate(certificate).public_key()
    except (ValueError, TypeError):
        return False
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.public_key().public_bytes(*form) == public.public_bytes(*form)


def _connections(needed: list[Reference], secrets: Mapping[str, Mapping[str, bytes]]) -> Iterator[Finding]:
    """Yields findings about the documents that name etcd's endpoints. Reads each document together with the other files
    of its volume, as a router does."""
    told = set()
    for volume in sorted({one.volume for one in needed if one.volume[1]}):
        together = [one for one in needed if one.volume == volume]
        holder = next((one.name for one in together if CONNECTION in secrets.get(one.name, {})), "")
        lacking = any(one.keys - secrets.get(one.name, {}).keys() for one in together)
        if not holder or holder in told or lacking:  # missing keys are already a finding
            continue
        told.add(holder)
        with tempfile.TemporaryDirectory() as folder:  # only this user can read it
            for one in together:
                for key, value in secrets.get(one.name, {}).items():
                    if "/" not in key and (not one.keys or key in one.keys):
                        Path(folder, key).write_bytes(value)
            try:
                found = etcdsecret.read(Path(folder, CONNECTION))
            except ValueError as error:
                text = f"{CONNECTION} of the Secret {holder} cannot be used: {str(error).replace(f'{folder}/', '')}"
                yield AREA.fail("etcd", text, "docs/kubernetes.md, Secrets, describes its contents")
                continue
        where = some(list(found.settings.endpoints))
        yield AREA.ok("etcd", f"the Secret {holder} names etcd at {where}, prefix {found.root_prefix or '(none)'}")


def _storage(data: Mapping[str, bytes]) -> Iterator[Finding]:
    bad = []
    for key, value in sorted(data.items()):
        try:
            document = json.loads(value)
            if not isinstance(document, dict):
                bad.append(f"{key} is not a JSON object")
            elif not isinstance(document.get("type"), str):
                bad.append(f'{key} has no "type"')
        except (ValueError, RecursionError):
            bad.append(f"{key} is not JSON")
    if bad:
        yield AREA.fail(
            "storage", f"in the Secret {STORAGE}, {some(bad)}", "docs/storage.md describes the value of a key"
        )
    else:
        yield AREA.ok("storage", f"the Secret {STORAGE} has {len(data)} stores: {some(sorted(data))}")
