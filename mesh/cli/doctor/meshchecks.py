"""Findings about a mesh, from the facts read at its endpoint, and the time. All functions are pure."""

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from mesh.cli.doctor import authchecks, certificates
from mesh.cli.doctor.findings import Area, Finding, some
from mesh.cli.doctor.handshake import Trouble
from mesh.cli.doctor.meshfacts import MeshFacts, Registered
from mesh.options.values import format_bytes
from mesh.statuses import Reason
from placement import constraints, limits, modeltypes, words

AREA = Area("mesh")

FULL = 0.9  # of the memory for models
SHORT_IDLE_MS = 300_000
"""Time since the next victim's last call, in a full pod, below which the models in use do not fit. The alert has the
same limit."""

WRONG_FACTOR = 2.0
"""Factor between a foreign server's observed memory and the sizes of its models above which the doctor says that the
sizes are wrong."""

SHOWN = 5
"""Number of models named in one finding."""

_OF_TROUBLE = {
    Trouble.UNRESOLVED: "check the name in --endpoint; names of Services resolve only in the cluster",
    Trouble.REFUSED: "check that a router runs, or run kubectl port-forward service/modelmesh-serving 8033:8033",
    Trouble.SILENT: "see the routers' logs, and what is in between: NetworkPolicy, firewall, a dead port-forward",
    Trouble.NO_TLS: "use http:// in the endpoint, or give the routers a certificate (tls.secretName)",
    Trouble.WANTS_TLS: "use https:// in the endpoint",
    Trouble.UNTRUSTED: "name the authority that signed it: --ca, MESH_CA, or `mesh context set`",
    Trouble.EXPIRED: "renew it in its Secret (tls.secretName): routers use the new one without a restart",
    Trouble.NOT_YET: "compare the clocks of this machine and of the issuer of the certificate",
    Trouble.REFUSES_US: "present a certificate signed by the routers' --tls-client-ca: --cert and --key",
}

_OF_REFUSAL = {
    Reason.UNAUTHENTICATED.name: "give an admin's key in MESH_API_KEY; the chart's is in the Secret mesh-admin-key",
    Reason.FORBIDDEN.name: "use a key with the role `read` on all models (docs/security.md)",
}


def check(facts: MeshFacts, now: datetime.datetime, *, stored: frozenset[str] | None = None) -> list[Finding]:
    """Returns all findings. `stored` has the keys of the storage Secret, if known."""
    found = [*_certificate(facts, now)]
    if facts.stats is None or facts.pods is None:
        return [_unreachable(facts), *found]
    workers = facts.stats.get("workers")
    counted = f"{workers} worker{'' if workers == 1 else 's'}"
    found.insert(0, AREA.ok("reach", f"a router answers at {facts.endpoint}, with {counted}"))
    found += [
        *_dataplane(facts.stats),
        *_grants_file(facts.stats),
        *_pods(facts.pods),
        *_observed(facts.pods),
        *_room(facts.pods),
    ]
    if facts.registered is None:
        text = f"the router answers, but cannot read its registry: {facts.registry_error}"
        return [
            *found,
            AREA.fail("registry", text, "check etcd: loaded models are served, but loads and registrations fail"),
        ]
    found += [*_registered(facts.registered), *_aliases(facts), *_settings(facts)]
    found += authchecks.check(facts.stats, facts.endpoint)
    found += _storage(facts.registered, stored) if stored is not None else ()
    return found


def _unreachable(facts: MeshFacts) -> Finding:
    trouble = facts.answer.trouble
    if trouble is Trouble.NONE and facts.reason in _OF_REFUSAL:
        return AREA.fail("key", f"{facts.endpoint}: {facts.error}", _OF_REFUSAL[facts.reason])
    if trouble is Trouble.NONE:
        return AREA.fail("reach", facts.error, "see the routers' logs; if the endpoint is gRPC only, use the REST port")
    text = f"{facts.endpoint}: {trouble.value}"
    todo = _OF_TROUBLE.get(trouble, "see the routers' logs")
    check = "reach"
    certificate = facts.answer.certificate
    if trouble is Trouble.OTHER_NAME:
        text += f": it is for {facts.answer.names}"
        todo = "use one of these names in the endpoint, or have the name added to the certificate"
        check = "certificate"
    elif trouble is Trouble.EXPIRED and certificate:
        text += f" on {certificate.ends:%Y-%m-%d %H:%M} UTC ({certificate.subject})"
        check = "certificate"
    elif trouble in (Trouble.UNTRUSTED, Trouble.REFUSES_US, Trouble.NOT_YET):
        text += f" ({facts.answer.text})" if facts.answer.text else ""
        check = "certificate"
    elif facts.answer.text and trouble is Trouble.OTHER:
        text += f" ({facts.answer.text})"
    return AREA.fail(check, text, todo)


def _certificate(facts: MeshFacts, now: datetime.datetime) -> Iterator[Finding]:
    certificate = facts.answer.certificate
    if certificate and facts.answer.trouble not in (Trouble.EXPIRED, Trouble.NOT_YET):
        todo = "renew it in its Secret (tls.secretName): routers use the new one without a restart"
        yield certificates.expiry(AREA, "expiry", f"the certificate of {facts.endpoint}", certificate, now, todo)


def _dataplane(stats: Mapping[str, Any]) -> Iterator[Finding]:
    config = stats.get("dataplane")
    if not isinstance(config, dict):
        return
    source, methods = config.get("source"), config.get("methods") or ()
    others = "others are allowed, too" if config.get("others") else "all others are refused"
    if error := config.get("error"):
        text = f"the data-plane configuration {source} cannot be used, so its previous content is still in use: {error}"
        yield AREA.fail("dataplane", text, "correct it: routers read it again immediately (docs/servers.md)")
    else:
        yield AREA.ok("dataplane", f"{source} has rules for {len(methods)} methods; {others}")


def _grants_file(stats: Mapping[str, Any]) -> Iterator[Finding]:
    filed = stats.get("grants_file")
    if not isinstance(filed, dict):
        return
    source = filed.get("source")
    if error := filed.get("error"):
        age = words.span(int(1000 * float(filed.get("age") or 0)))
        text = f"the file with grants {source} cannot be used, so its content of {age} ago is still in use: {error}"
        yield AREA.fail("grants", text, "correct it: routers read it again immediately (docs/security.md)")
    else:
        yield AREA.ok("grants", f"{source} has {filed.get('grants')} grants")


def _pods(pods: tuple[Mapping[str, Any], ...]) -> Iterator[Finding]:
    if not pods:
        todo = "check that they run and reach etcd: kubectl get pods -l app.kubernetes.io/component=runtime"
        yield AREA.fail("pods", "there are no runtime pods, so no model can be called", todo)
        return
    ready = [str(pod.get("pod")) for pod in pods if _is_ready(pod)]
    suspect = [str(pod.get("pod")) for pod in pods if pod.get("suspect")]
    if suspect:
        text = f"{some(suspect)} {'has' if len(suspect) == 1 else 'have'} disappeared from etcd without draining"
        yield AREA.warn(
            "pods", f"{text}; calls still go there until one fails", "check these pods, and whether etcd is slow"
        )
    if ready:
        yield AREA.ok("pods", f"{len(ready)} runtime pods are ready: {some(ready)}")
    else:
        text = f"none of {len(pods)} runtime pods is ready"
        yield AREA.fail("pods", text, "see their logs; a pod that is leaving or suspect gets no loads")


def _observed(pods: tuple[Mapping[str, Any], ...]) -> Iterator[Finding]:
    """Yields a finding about pods with a foreign server whose memory is not observed, or whose models need much more
    memory than their sizes say."""
    foreign = [pod for pod in pods if pod.get("factor")]
    unseen = [pod for pod in foreign if pod.get("unobserved")]
    wrong = [str(pod.get("pod")) for pod in foreign if float(pod.get("factor") or 0) >= WRONG_FACTOR]
    if unseen:
        text = f"the memory of the model servers of {some([str(pod.get('pod')) for pod in unseen])} is not observed"
        todo = "make the server state its models' sizes, or share a process namespace with it (docs/servers.md)"
        yield AREA.warn("memory", f"{text}: {unseen[0].get('unobserved')}", todo)
    if wrong:
        text = f"the models of {some(wrong)} use far more memory than their server states"
        yield AREA.warn("sizes", text, "correct the sizes that the server reports; loads there run one at a time")
    if foreign and not unseen and not wrong:
        yield AREA.ok("memory", "the memory of all foreign model servers is observed")


def _is_ready(pod: Mapping[str, Any]) -> bool:
    return pod.get("state") == "ready" and not pod.get("suspect")


def _room(pods: tuple[Mapping[str, Any], ...]) -> Iterator[Finding]:
    """Yields a finding about whether the models in use fit into the pods' memory. Full pods are normal, and alone no
    reason for a warning."""
    capacity, used = (sum(int(pod.get(name) or 0) for pod in pods) for name in ("capacity", "used"))
    if not capacity:
        return
    text = f"{format_bytes(used)} of {format_bytes(capacity)} in use, {100 * used / capacity:.0f} %"
    busy = [
        str(pod.get("pod"))
        for pod in pods
        if int(pod.get("used") or 0) >= FULL * int(pod.get("capacity") or 0) > 0
        and 0 < int(pod.get("oldest_idle_ms") or 0) < SHORT_IDLE_MS
    ]
    if busy:
        text += f"; {some(busy)} {'is' if len(busy) == 1 else 'are'} full of models used within five minutes"
        yield AREA.warn(
            "room", text, "models in use do not fit: more pods, or more memory for each (docs/placement.md)"
        )
    else:
        yield AREA.ok("room", text)


def _registered(registered: Registered) -> Iterator[Finding]:
    text = f"{registered.models} models are registered"
    if registered.whole:
        yield AREA.ok("models", text)
    else:
        todo = "set a longer --reading to check all of them"
        yield AREA.warn("models", f"there are more than {registered.models} models; only these were checked", todo)
    for quarantined, count, check, what, todo in (
        (True, registered.quarantined, "quarantine", "quarantined", "find out why; then `mesh release MODEL`"),
        (False, registered.failing, "failing", "failing to load", "`mesh status MODEL` shows the errors"),
    ):
        if count:
            lines = [f"{one.model}: {one.why}" for one in registered.troubled if one.quarantined is quarantined]
            shown = "; ".join(lines[:SHOWN]) + (f"; and {count - SHOWN} more" if count > SHOWN else "")
            yield AREA.warn(check, f"{count} {'model is' if count == 1 else 'models are'} {what}: {shown}", todo)
        elif registered.whole:
            yield AREA.ok(check, f"no model is {what}")


def _aliases(facts: MeshFacts) -> Iterator[Finding]:
    aliases, registered = facts.aliases, facts.registered
    if aliases is None or registered is None or not aliases.count:
        return
    if aliases.stuck:
        count = len(aliases.stuck)
        lines = [f"{move.alias} to {move.target}: {move.why or 'no reason is recorded'}" for move in aliases.stuck]
        shown = "; ".join(lines[:SHOWN]) + (f"; and {count - SHOWN} more" if count > SHOWN else "")
        text = f"{count} {'alias has' if count == 1 else 'aliases have'} not moved to a target that cannot be loaded"
        yield AREA.warn("moves", f"{text}: {shown}", "register a version that loads, or `mesh rollback ALIAS`")
    else:
        yield AREA.ok("moves", f"no alias is stuck ({aliases.count} aliases, {aliases.moving} moving)")
    if not registered.whole:
        return
    if aliases.named:
        count = len(aliases.named)
        lines = [f"{alias} names {model}" for model, alias in sorted(aliases.named.items())]
        shown = "; ".join(lines[:SHOWN]) + (f"; and {count - SHOWN} more" if count > SHOWN else "")
        text = f"aliases name {count} {'model that is' if count == 1 else 'models that are'} not registered: {shown}"
        yield AREA.fail("aliases", text, "register them, or move the aliases (`mesh alias set`)")
    else:
        yield AREA.ok("aliases", "every model that an alias names is registered")


def _settings(facts: MeshFacts) -> Iterator[Finding]:
    texts = facts.settings or {}
    try:
        limits.parse(texts.get("type_limits") or "")
    except ValueError as error:
        text = f"the setting type_limits is not valid, so an older value may still be in use: {error}"
        yield AREA.fail("settings", text, "set it again: mesh settings type_limits '{...}'")
    try:
        asked = constraints.parse(texts.get("type_constraints") or "")
    except ValueError as error:
        text = f"the setting type_constraints is not valid, so an older value may still be in use: {error}"
        yield AREA.fail("settings", text, "set it again: mesh settings type_constraints '{...}'")
        return
    pods = [frozenset(str(label) for label in pod.get("labels") or ()) for pod in facts.pods or () if _is_ready(pod)]
    if not pods or facts.registered is None:
        return
    nowhere = [kind for kind in sorted(facts.registered.types) if not any(asked.allows(kind, one) for one in pods)]
    for kind in nowhere:
        count = facts.registered.types[kind]
        labels = ", ".join(sorted(asked.of(kind).required))
        text = f"no pod may hold models of type {kind} ({count} registered): none has all the labels {labels}"
        yield AREA.fail("types", text, "give a pool these labels (pools[].labels), or change type_constraints")
    served = [frozenset(str(one) for one in pod.get("types") or ()) for pod in facts.pods or () if _is_ready(pod)]
    for kind in sorted(facts.registered.types.keys() - set(nowhere)):
        if text := modeltypes.untaken(kind, served):
            count = facts.registered.types[kind]
            todo = "add a pool with a server that accepts this type, or register the models with their right type"
            yield AREA.fail("types", f"{text} ({count} registered)", todo)
            nowhere.append(kind)
    if not nowhere:
        yield AREA.ok("types", "every registered type has pods that may hold it")


def _storage(registered: Registered, stored: frozenset[str]) -> Iterator[Finding]:
    missing = sorted(registered.keys.keys() - stored)
    for key in missing:
        count, example = registered.keys[key], registered.example.get(f"key {key}", "")
        text = f"the storage Secret has no key {key}, which {count} {'model names' if count == 1 else 'models name'}"
        text += f" ({example}{', ...' if count > 1 else ''})"
        yield AREA.fail("storage", text, f"add {key} to the Secret storage-config: these models cannot be pulled")
    if not missing:
        yield AREA.ok("storage", f"the storage Secret has every key that models name ({len(registered.keys)})")
