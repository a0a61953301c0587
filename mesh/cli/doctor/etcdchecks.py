"""Findings about etcd, from its facts and the time. All functions are pure."""

import datetime
import json
import statistics
from collections.abc import Iterator

from mesh.cli.doctor import certificates
from mesh.cli.doctor.etcdfacts import EtcdFacts, MemberFacts
from mesh.cli.doctor.findings import Area, Finding, some
from mesh.cli.doctor.handshake import Trouble
from mesh.etcdserver.single import version_warning
from mesh.options.values import format_bytes
from mesh.schema import owner

AREA = Area("etcd")

DEFAULT_QUOTA = 2 * 2**30
"""Limit of etcd's database if none is set."""

QUOTA_WARN, QUOTA_FAIL = 0.8, 0.95  # shares of the quota; the alert fires at the first too
READ_WARN_MS, READ_FAIL_MS = 100.0, 1000.0
"""Durations of a read above which the doctor warns, and above which it fails. etcd calls a request slow from 100 ms on.
If reads take a second, leases of the usual length expire."""

_OF_TROUBLE = {
    Trouble.UNRESOLVED: "check the name (--etcd; `endpoints` in the Secret); names of pods resolve only in the cluster",
    Trouble.REFUSED: "check that etcd runs there, and that the port is right",
    Trouble.SILENT: "check whether etcd hangs (its log, its disk), and what is in between: NetworkPolicy, firewall",
    Trouble.NO_TLS: "use http:// in the endpoint, or enable TLS in etcd",
    Trouble.WANTS_TLS: "use https:// in the endpoint, and name the authority: --etcd-ca, `certificate_file`",
    Trouble.UNTRUSTED: "name the authority that signed it: --etcd-ca, or `certificate_file` in the Secret; if that has "
    "just changed, the chart's etcd follows within three minutes",
    Trouble.EXPIRED: "renew etcd's certificate; with the chart's own, run a Job from the CronJob mesh-certificates",
    Trouble.NOT_YET: "compare the clocks of this machine and of the issuer of the certificate",
    Trouble.REFUSES_US: "present one signed by etcd's authority: --etcd-cert, --etcd-key; `client_certificate_file`",
}


def check(facts: EtcdFacts, now: datetime.datetime, *, install_id: str = "", quota: int = 0) -> list[Finding]:
    """Returns all findings. If `quota` is 0, etcd's database is compared with the quota that etcd reports, or else with
    etcd's default."""
    found = [*_members(facts), *_own_certificates(facts, now)]
    if facts.denied:
        todo = "check user and password (--etcd-user, --etcd-password-file; `userid`, `password` in the Secret)"
        if "permission" in facts.denied:
            todo = f"grant the user read and write below {facts.base}/ (etcdctl role grant-permission)"
        found.append(AREA.fail("password", f"etcd refuses this user: {_said(facts.denied)}", todo))
    if not any(member.status for member in facts.members):
        return found
    found += [*_cluster(facts), *_alarms(facts), *_quotas(facts, quota), *_latency(facts)]
    if facts.reads_ms:
        found += [_owner(facts, install_id), *_prefix(facts)]
    return found


def _members(facts: EtcdFacts) -> Iterator[Finding]:
    healthy = [member for member in facts.members if member.status]
    for member in facts.members:
        if member.status:
            yield AREA.ok("reach", f"{member.endpoint} answers, version {member.status.version}")
            if warning := version_warning(member.status.version):
                yield AREA.warn("version", warning, "replace it with a current etcd (3.5.x or 3.6)")
        elif not member.denied or member.answer.trouble is not Trouble.NONE:
            yield _unreachable(member, facts, others=bool(healthy))


def _unreachable(member: MemberFacts, facts: EtcdFacts, *, others: bool) -> Finding:
    trouble = member.answer.trouble
    level = AREA.warn if others else AREA.fail
    check = "certificate" if trouble in _CERTIFICATE else "reach"
    todo = _OF_TROUBLE.get(trouble, "see etcd's log")
    if trouble is Trouble.NONE:
        text = f"{member.endpoint} accepts connections but does not answer: {_said(member.error)}"
        return level(check, text, "see its log: it may be starting, have no leader, or be blocked by its disk")
    text = f"{member.endpoint}: {trouble.value}"
    certificate = member.answer.certificate
    if trouble is Trouble.OTHER_NAME:
        host = facts.settings.server_name or member.endpoint
        text += f": it is for {member.answer.names}"
        todo = f"use one of these names, or add {host} to the certificate; `override_authority` in the Secret sets one"
    elif trouble is Trouble.EXPIRED and certificate:
        text += f" on {certificate.ends:%Y-%m-%d %H:%M} UTC ({certificate.subject})"
    elif trouble is Trouble.UNTRUSTED and certificate:
        text += f" ({certificate.subject}: {member.answer.text})"
    elif trouble in (Trouble.OTHER, Trouble.REFUSES_US) and member.answer.text:
        text += f" ({member.answer.text})"
    return level(check, text, todo)


_CERTIFICATE = (Trouble.UNTRUSTED, Trouble.EXPIRED, Trouble.NOT_YET, Trouble.OTHER_NAME, Trouble.REFUSES_US)


def _own_certificates(facts: EtcdFacts, now: datetime.datetime) -> Iterator[Finding]:
    """Judges the expiry of the certificates of etcd and of the client."""
    renew = "renew it before; with the chart's own certificates see the CronJob mesh-certificates"
    for member in facts.members:
        certificate = member.answer.certificate
        if certificate and member.answer.trouble not in (Trouble.EXPIRED, Trouble.NOT_YET):
            yield certificates.expiry(AREA, "expiry", f"the certificate of {member.endpoint}", certificate, now, renew)
    for raw, what in ((facts.settings.ca, "the authority"), (facts.settings.certificate, "the client's certificate")):
        if raw:
            yield certificates.pem(AREA, "expiry", f"{what} for etcd", raw, now, renew)


def _cluster(facts: EtcdFacts) -> Iterator[Finding]:
    without = [member.endpoint for member in facts.members if member.status and not member.status.has_leader]
    if without:
        todo = "more than half of its members must run and reach each other: see their pods and logs"
        yield AREA.fail("leader", f"{some(without)}: no leader, so nothing can be read or written", todo)
    else:
        yield AREA.ok("leader", "there is a leader")
    clusters = {member.status.cluster for member in facts.members if member.status}
    if len(clusters) > 1:
        text = f"the endpoints are members of {len(clusters)} different clusters"
        yield AREA.fail(
            "members", text, "name the members of one etcd only: otherwise routers see different registries"
        )
    if facts.listed is None:
        return
    answering = {member.status.member for member in facts.members if member.status}
    missing = [one.name or f"{one.id:x}" for one in facts.listed if one.id not in answering and not one.learner]
    voters = sum(not one.learner for one in facts.listed)
    if not missing or len(facts.members) < voters:  # not every member was named here, so the others were not asked
        yield AREA.ok("members", f"{voters} {'member' if voters == 1 else 'members'}")
    else:
        spare = (voters - 1) // 2 - len(missing)
        text = f"{some(missing)} of {voters} members {'does' if len(missing) == 1 else 'do'} not answer"
        text += "; if one more fails, there is no quorum" if spare == 0 else ""
        yield AREA.warn("members", text, "see that member's pod, its log and its disk")


def _alarms(facts: EtcdFacts) -> Iterator[Finding]:
    names = {one.id: one.name for one in facts.listed or ()}
    for alarm in facts.alarms or ():
        who = names.get(alarm.member) or f"{alarm.member:x}"
        if alarm.kind == "NOSPACE":
            text = f"alarm NOSPACE from {who}: the database is full, so nothing can be registered or loaded"
            todo = "raise the quota (etcd.quota; --quota-backend-bytes), or compact and defragment"
            todo += "; then etcdctl alarm disarm"
        else:
            text = f"alarm {alarm.kind} from {who}: members have different data"
            todo = "run `mesh backup` for each member, find the right one, replace the others"
        yield AREA.fail("alarm", text, todo)
    if facts.alarms is None:  # without the right to list alarms, the status of members still shows them
        for error in sorted({error for member in facts.members if member.status for error in member.status.errors}):
            todo = "raise the quota (etcd.quota; --quota-backend-bytes) if it is NOSPACE; see `etcdctl alarm list`"
            yield AREA.fail("alarm", f"etcd reports: {error}", todo)
    if facts.alarms == ():
        yield AREA.ok("alarm", "no alarms")


def _quotas(facts: EtcdFacts, given: int) -> Iterator[Finding]:
    for member in facts.members:
        status = member.status
        if status is None:
            continue
        quota = given or status.quota_bytes or DEFAULT_QUOTA
        share = status.db_bytes / quota
        guessed = "" if given or status.quota_bytes else " (etcd's default; --quota sets another)"
        text = (
            f"{member.endpoint}: {format_bytes(status.db_bytes)} of {format_bytes(quota)}{guessed}, {100 * share:.0f} %"
        )
        if share < QUOTA_WARN:
            yield AREA.ok("quota", text)
            continue
        todo = (
            "raise it together with its volume (etcd.quota; --quota-backend-bytes): beyond it nothing can be registered"
        )
        if status.db_used_bytes < status.db_bytes / 2:
            todo = f"etcdctl defrag: only {format_bytes(status.db_used_bytes)} of it is in use; or {todo}"
        yield (AREA.fail if share >= QUOTA_FAIL else AREA.warn)("quota", text, todo)


def _latency(facts: EtcdFacts) -> Iterator[Finding]:
    if facts.read_error and not facts.denied:
        text = f"reads fail: {_said(facts.read_error)}"
        yield AREA.fail("latency", text, "without a quorum etcd does not answer reads: see its members and their logs")
    if not facts.reads_ms:
        return
    median, worst = statistics.median(facts.reads_ms), max(facts.reads_ms)
    text = f"a read takes {median:.3g} ms at the median, {worst:.3g} ms at most"
    todo = (
        "see its disk's fsync times (etcd_disk_wal_fsync_duration_seconds) and CPU limit; pods lose leases if it stalls"
    )
    if median >= READ_FAIL_MS:
        yield AREA.fail("latency", text, todo)
    elif median >= READ_WARN_MS:
        yield AREA.warn("latency", text, todo)
    else:
        yield AREA.ok("latency", text)


def _owner(facts: EtcdFacts, install_id: str) -> Finding:
    key = f"{facts.base}/owner"
    if not facts.owner:
        if install_id:
            text = f"no process has taken the prefix {facts.base} for {install_id!r} yet"
            return AREA.warn(
                "owner", text, "check that routers and pods run, and have the same --base and --install-id"
            )
        return AREA.ok("owner", f"the prefix {facts.base} has no owner")
    try:
        found = json.loads(facts.owner)
        install, schema = str(found["install"]), int(found["schema"])
    except (ValueError, KeyError, TypeError):
        return AREA.fail(
            "owner", f"the key {key} cannot be read", f"look at it with etcdctl get {key}; processes refuse to start"
        )
    if install_id and install != install_id:
        text = f"the prefix {facts.base} belongs to the mesh {install!r}, but this is {install_id!r}"
        return AREA.fail(
            "owner",
            text,
            f"use another root prefix or base for this one; if {install!r} is gone, run mesh prefix transfer",
        )
    if schema > owner.SCHEMA:
        return AREA.fail(
            "owner", f"the keys have version {schema}, this program knows {owner.SCHEMA}", "use a newer program"
        )
    return AREA.ok("owner", f"the prefix {facts.base} belongs to {install!r}")


def _prefix(facts: EtcdFacts) -> Iterator[Finding]:
    if facts.models is None or facts.pods is None:
        return
    if not facts.models and not facts.pods and not facts.owner:
        text = f"there are no keys below {facts.base}: no models, no pods"
        yield AREA.warn("prefix", text, "if there should be a mesh, check --base (MESH_BASE) and `root_prefix`")
        return
    yield AREA.ok("prefix", f"{facts.models} models, {facts.pods} pods below {facts.base}")
    if not facts.pods:
        todo = "check that runtime pods run and reach etcd: kubectl get pods -l app.kubernetes.io/component=runtime"
        yield AREA.fail("pods", "no runtime pod has registered itself, so no model can be called", todo)


def _said(text: str) -> str:
    """Returns etcd's message without the prefix that Mesh adds."""
    return text.rpartition(": ")[2] if "etcdserver: " in text else text
