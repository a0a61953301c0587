"""Facts about one namespace, from Kubernetes. `clusterchecks` judges them.

A user with the role `admin` of the namespace may send all of these requests. Of the Secrets, only those that the mesh's
workloads use are read, by name. Others do not concern the mesh, and those of Helm are large.
"""

import asyncio
import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.cli.doctor.kubectl import Kubectl, KubectlError

Object = Mapping[str, Any]

SELECTOR = "app.kubernetes.io/name=mesh"

STORAGE = "storage-config"
"""Name of the Secret whose keys are models' storage keys."""

RIGHTS: tuple[tuple[str, str, str, str], ...] = (
    ("", "pods", "list", "see the mesh's pods"),
    ("", "secrets", "get", "check Secrets, and install"),
    ("", "events", "list", "see why pods do not start"),
    ("", "persistentvolumeclaims", "list", "see volumes"),
    ("", "pods/portforward", "create", "reach the mesh through a port-forward"),
    ("", "pods/exec", "create", "run `mesh backup` in a router pod"),
    ("apps", "deployments", "patch", "upgrade, restart and scale"),
)
"""The rights that the admin needs, each with API group, resource, verb, and purpose."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference from a workload to a Secret that it mounts or reads."""

    name: str
    keys: frozenset[str]  # the required ones
    optional: bool
    volume: tuple[str, str]  # workload and volume
    pulls: bool = False  # images are pulled with it


@dataclass(slots=True)
class ClusterFacts:
    """Facts about a namespace. A fact that could not be read is None, and `errors` says why."""

    namespace: str
    error: str = ""  # why the cluster does not answer at all
    pods: list[Object] | None = None
    workloads: list[Object] | None = None
    claims: list[Object] | None = None
    jobs: list[Object] | None = None
    scalers: list[Object] | None = None  # HorizontalPodAutoscalers
    events: list[Object] | None = None
    secrets: dict[str, dict[str, bytes]] | None = None
    lacking: list[str] | None = None  # rights that are missing, with their purposes
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """True if the facts that could be read show a mesh in the namespace."""
        return bool(self.pods or self.workloads)

    @property
    def nothing(self) -> str:
        """The reason why no mesh was found."""
        if error := self.errors.get("pods") or self.errors.get("workloads"):
            return f"the namespace {self.namespace} cannot be read: {error}"
        return f"there is no mesh in the namespace {self.namespace}"

    @property
    def router(self) -> str:
        """The name of a router Deployment with a ready pod, or "" if no such Deployment exists."""
        for one in self.workloads or ():
            if label(one, "component") == "router" and (one.get("status") or {}).get("readyReplicas"):
                return name(one)
        return ""


async def gather(kubectl: Kubectl) -> ClusterFacts:
    """Gathers all facts from Kubernetes. A failed request leaves its fact None."""
    facts = ClusterFacts(kubectl.namespace or await _current(kubectl))
    try:
        facts.pods = [*await kubectl.items("get", "pods", f"--selector={SELECTOR}")]
    except KubectlError as error:
        facts.errors["pods"] = str(error)
        if "forbidden" not in str(error).lower():
            facts.error = str(error)
            return facts

    async def ask(what: str, kinds: str, *arguments: str) -> list[Object] | None:
        try:
            return [*await kubectl.items("get", kinds, *arguments)]
        except KubectlError as error:
            facts.errors[what] = str(error)
            return None

    facts.workloads, facts.claims, facts.jobs, facts.scalers, facts.events, facts.lacking = await asyncio.gather(
        ask("workloads", "deployments.apps,statefulsets.apps", f"--selector={SELECTOR}"),
        ask("volume claims", "persistentvolumeclaims"),
        ask("jobs", "jobs.batch"),  # those of a CronJob have no labels
        ask("autoscalers", "horizontalpodautoscalers.autoscaling", f"--selector={SELECTOR}"),
        ask("events", "events"),
        _lacking(kubectl, facts),
    )
    if facts.workloads:
        names = sorted({one.name for one in references(facts.workloads)} | {STORAGE})
        found = await ask("secrets", "secrets", *names, "--ignore-not-found")
        if found is not None:
            facts.secrets = {str(name(one)): _data(one) for one in found}
    return facts


async def _current(kubectl: Kubectl) -> str:
    try:
        return (
            await kubectl.text("config", "view", "--minify", "--output=jsonpath={..namespace}")
        ).strip() or "default"
    except KubectlError:
        return "default"


async def _lacking(kubectl: Kubectl, facts: ClusterFacts) -> list[str] | None:
    reviews = [
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {
                "resourceAttributes": {
                    "namespace": facts.namespace,
                    "group": group,
                    "resource": resource.partition("/")[0],
                    "subresource": resource.partition("/")[2],
                    "verb": verb,
                }
            },
        }
        for group, resource, verb, _ in RIGHTS
    ]
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews}).encode()
    try:
        answers = await kubectl.items("create", "--filename=-", stdin=document)
    except KubectlError as error:
        facts.errors["rights"] = str(error)
        return None
    allowed = [bool((one.get("status") or {}).get("allowed")) for one in answers]
    if len(allowed) != len(RIGHTS):
        facts.errors["rights"] = f"{len(allowed)} of {len(RIGHTS)} access reviews were answered"
        return None
    return [
        f"{verb} {resource} ({use})" for yes, (_, resource, verb, use) in zip(allowed, RIGHTS, strict=True) if not yes
    ]


def references(workloads: Iterable[Object]) -> Iterator[Reference]:
    """Yields the references to Secrets: in volumes, in environments, and for pulling images."""
    for workload in workloads:
        spec = ((workload.get("spec") or {}).get("template") or {}).get("spec") or {}
        owner = str(name(workload))
        for volume in spec.get("volumes") or ():
            place = (owner, str(volume.get("name", "")))
            if "secret" in volume:
                yield _reference(volume["secret"], "secretName", place)
            for source in (volume.get("projected") or {}).get("sources") or ():
                if "secret" in source:
                    yield _reference(source["secret"], "name", place)
        for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
            for variable in container.get("env") or ():
                chosen = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if chosen:
                    keys = frozenset((str(chosen.get("key", "")),))
                    yield Reference(str(chosen.get("name", "")), keys, bool(chosen.get("optional")), (owner, ""))
        for pull in spec.get("imagePullSecrets") or ():
            yield Reference(str(pull.get("name", "")), frozenset(), False, (owner, ""), pulls=True)


def _reference(source: Object, field: str, place: tuple[str, str]) -> Reference:
    keys = frozenset(str(item.get("key", "")) for item in source.get("items") or ())
    return Reference(str(source.get(field, "")), keys, bool(source.get("optional")), place)


def _data(secret: Object) -> dict[str, bytes]:
    found = {}
    for key, text in (secret.get("data") or {}).items():
        try:
            found[str(key)] = base64.b64decode(text)
        except (ValueError, binascii.Error):  # which Kubernetes itself would not store
            found[str(key)] = b""
    return found


def name(one: Object) -> str:
    """Returns an object's name."""
    return str((one.get("metadata") or {}).get("name", ""))


def label(one: Object, which: str) -> str:
    """Returns the value of the label `app.kubernetes.io/<which>`, or "" without this label."""
    return str(((one.get("metadata") or {}).get("labels") or {}).get(f"app.kubernetes.io/{which}", ""))
