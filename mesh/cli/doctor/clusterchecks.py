"""Findings about a namespace in Kubernetes, from its facts. All functions are pure. `secretchecks` judges Secrets."""

from collections.abc import Iterator
from typing import Any

from mesh.cli.doctor.clusterfacts import ClusterFacts, Object, label, name
from mesh.cli.doctor.findings import Area, Finding, Level, some

AREA = Area("kubernetes")

_PULL = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
_OF_WAITING = {
    "CrashLoopBackOff": "see why it ended with kubectl logs POD --previous",
    "CreateContainerConfigError": "check that the Secrets and ConfigMaps that it names exist, with all keys",
    "CreateContainerError": "see kubectl describe pod POD",
    "RunContainerError": "see kubectl describe pod POD",
}
_TROUBLE_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "Failed", "Unhealthy", "BackOff")


def check(facts: ClusterFacts) -> list[Finding]:
    """Returns all findings except those about Secrets."""
    if facts.error:
        todo = "check the current context: kubectl config current-context, kubectl get pods"
        return [AREA.fail("reach", f"the cluster cannot be read with kubectl: {facts.error}", todo)]
    found = [*_rights(facts)]
    if not facts.installed:
        text = facts.nothing
        return [*found, AREA.fail("reach", text, "set --namespace to that of the mesh")]
    found.insert(0, AREA.ok("reach", f"the namespace {facts.namespace} has a mesh"))
    found += [*_workloads(facts), *_jobs(facts), *_pods(facts), *_scalers(facts), *_claims(facts)]
    return found + [
        AREA.warn("rights", f"{what} could not be read: {error}", "ask for the role `admin` of the namespace")
        for what, error in sorted(facts.errors.items())
    ]


def _rights(facts: ClusterFacts) -> Iterator[Finding]:
    if facts.lacking:
        todo = "ask for the role `admin` of the namespace"
        yield AREA.warn("rights", f"you have no right to {'; '.join(facts.lacking)}", todo)
    elif facts.lacking is not None:
        yield AREA.ok("rights", "you have all rights that running a mesh needs")


def _workloads(facts: ClusterFacts) -> Iterator[Finding]:
    seen = set()
    for workload in facts.workloads or ():
        component = label(workload, "component")
        seen.add(component)
        spec, status = workload.get("spec") or {}, workload.get("status") or {}
        wanted = int(spec.get("replicas", 1) if spec.get("replicas") is not None else 1)
        ready = int(status.get("readyReplicas") or 0)
        text = f"{name(workload)}: {ready} of {wanted} pods ready"
        if wanted == 0 and component in ("router", "runtime", "etcd"):
            yield AREA.warn("workload", f"{text}: it is scaled to 0", f"kubectl scale {_path(workload)} --replicas=1")
        elif ready >= wanted:
            yield AREA.ok("workload", text)
        else:
            why = _refused(workload, facts)
            made = any(label(pod, "component") == component for pod in facts.pods or ())
            todo = _todo_refused(why) if why or not made else "see the findings about its pods"
            level = Level.FAIL if ready == 0 or why else Level.WARN
            yield Finding(level, AREA.name, "workload", f"{text}{f': {why}' if why else ''}", todo)
    if facts.workloads is not None:
        for component, text in (("router", "no router"), ("runtime", "no pool of runtime pods")):
            if component not in seen:
                what = f"the namespace {facts.namespace} has {text}"
                yield AREA.fail("workload", what, "install or upgrade the chart; see its values `router` and `pools`")


_JOBS = {
    "mesh-certificates": "certificates of the mesh's processes are not issued or renewed, and new pods wait for them",
    "mesh-admin-key": "the admin's key is not made, and new routers wait for it",
    "mesh-etcd-snapshots": "no snapshots of etcd are taken",
}
"""Consequences if a Job of the chart gets no pod, by the beginning of its name."""


def _jobs(facts: ClusterFacts) -> Iterator[Finding]:
    """Yields a finding for each Job whose pods are refused. Such a Job has no pod that could show the error."""
    for job in facts.jobs or ():
        meaning = next((text for start, text in _JOBS.items() if name(job).startswith(start)), None)
        status = job.get("status") or {}
        if meaning is None or status.get("succeeded") or status.get("active"):
            continue
        events = _latest(facts, of=name(job), kind="Job")
        refused = next((event for event in events if event.get("reason") == "FailedCreate"), None)
        failed = next((c for c in status.get("conditions") or () if (c.get("type"), c.get("status")) == _FAILED), None)
        if refused is not None:
            why = str(refused.get("message", ""))
            todo = "set the chart's values `jobs` to what the namespace requires (LimitRange, quota), and upgrade"
            todo = todo if "serviceaccount" not in why.lower() and "PodSecurity" not in why else _todo_refused(why)
            yield AREA.fail("jobs", f"the pods of the Job {name(job)} are not created: {why}; {meaning}", todo)
        elif failed is not None:
            why = str(failed.get("message") or failed.get("reason") or "")
            yield AREA.warn("jobs", f"the Job {name(job)} failed: {why}", f"kubectl logs job/{name(job)}")


_FAILED = ("Failed", "True")


def _scalers(facts: ClusterFacts) -> Iterator[Finding]:
    """Yields a finding for each autoscaler that cannot read its metric. Such an autoscaler does not scale, and only its
    conditions show why."""
    for scaler in facts.scalers or ():
        conditions = {one.get("type"): one for one in (scaler.get("status") or {}).get("conditions") or ()}
        for kind in ("AbleToScale", "ScalingActive"):
            condition = conditions.get(kind) or {}
            # Scaling is rightly disabled while the workload is scaled to 0.
            if condition.get("status") == "False" and condition.get("reason") != "ScalingDisabled":
                reason, message = str(condition.get("reason", "")), str(condition.get("message", ""))
                todo = "see kubectl describe hpa " + name(scaler)
                if reason == "FailedGetResourceMetric":
                    todo = "install metrics-server, or disable autoscaling in the values"
                elif reason.startswith("FailedGet"):
                    todo = "supply the metric to the HPA with prometheus-adapter or KEDA (docs/kubernetes.md, Scale)"
                yield AREA.warn("autoscaling", f"{name(scaler)} does not scale: {reason}: {message}", todo)
                break


def _path(workload: Object) -> str:
    return f"{str(workload.get('kind', 'deployment')).lower()}/{name(workload)}"


def _refused(workload: Object, facts: ClusterFacts) -> str:
    """Returns the reason why the pods of a workload are not created, or "" if none is known."""
    for condition in (workload.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message", ""))
    for event in _latest(facts, prefix=name(workload)):
        if event.get("reason") == "FailedCreate":
            return str(event.get("message", ""))
    return ""


def _todo_refused(why: str) -> str:
    if "quota" in why:
        return "ask for a larger quota, or lower requests and limits in the values"
    if "PodSecurity" in why:
        return (
            "remove from the values what the Pod Security level `restricted` does not allow (extraVolumes, "
            "securityContext)"
        )
    if "serviceaccount" in why.lower():
        return "the ServiceAccount is missing: helm upgrade creates it again"
    return "see kubectl describe: its pods are not created"


def _pods(facts: ClusterFacts) -> Iterator[Finding]:
    fine: dict[str, int] = {}
    for pod in facts.pods or ():
        status = pod.get("status") or {}
        component = label(pod, "component") or "pod"
        if status.get("phase") == "Succeeded" or (pod.get("metadata") or {}).get("deletionTimestamp"):
            continue
        found = _pod(pod, facts)
        if found is None:
            fine[component] = fine.get(component, 0) + 1
        else:
            yield found
        yield from _killed(pod)
    if fine:
        yield AREA.ok(
            "pods", "ready: " + ", ".join(f"{count} {component}" for component, count in sorted(fine.items()))
        )


def _pod(pod: Object, facts: ClusterFacts) -> Finding | None:
    """Returns a finding about a pod that is not ready, or None if the pod is ready."""
    status = pod.get("status") or {}
    who = f"{name(pod)} ({label(pod, 'component') or 'pod'})"
    if status.get("phase") == "Failed":
        text = f"{who} failed: {status.get('reason') or ''} {status.get('message') or _ended(status)}".rstrip(" :")
        return AREA.warn("pods", text, f"kubectl logs {name(pod)}")
    conditions = {one.get("type"): one for one in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        todo = "free resources on a node, or lower the pod's requests; labels, taints and volumes must also fit a node"
        return AREA.fail("pods", f"{who} is Pending: {scheduled.get('message') or scheduled.get('reason')}", todo)
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
        if reason in _PULL:
            text = f"{who}: {reason}: {message}".rstrip(": ")
            return AREA.fail("pods", text, "check image.registry, repository and tag, and imagePullSecrets")
        if reason in _OF_WAITING:
            text = f"{who}: {reason}: {message or _ended(status)}".rstrip(": ")
            return AREA.fail("pods", text, _OF_WAITING[reason].replace("POD", name(pod)))
    if (conditions.get("Ready") or {}).get("status") == "True":
        return None
    told = next((str(event.get("message", "")) for event in _latest(facts, of=name(pod))), "")
    why = told or str((conditions.get("Ready") or {}).get("message") or "it is starting")
    todo = f"kubectl logs {name(pod)}; kubectl describe pod {name(pod)}"
    if "FailedMount" in why or "not found" in why:
        todo = "check that the Secrets and ConfigMaps that it mounts exist, with all keys"
    return AREA.warn("pods", f"{who} is not ready: {why}", todo)


def _killed(pod: Object) -> Iterator[Finding]:
    for container in _containers(pod.get("status") or {}):
        last = (container.get("lastState") or {}).get("terminated") or {}
        now = (container.get("state") or {}).get("terminated") or {}
        for ended in (now, last):
            if ended.get("reason") == "OOMKilled":
                text = f"{name(pod)} ({container.get('name')}) was killed for memory (OOMKilled)"
                text += f" at {ended['finishedAt']}" if ended.get("finishedAt") else ""
                todo = "raise its memory limit; the log of a runtime pod names the model that probably caused the end"
                yield AREA.warn("memory", f"{text}, {container.get('restartCount', 0)} restarts", todo)
                return


def _containers(status: Object) -> list[dict[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _ended(status: Object) -> str:
    for container in _containers(status):
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            ended = state.get("terminated")
            if ended:
                return f"{ended.get('reason', 'ended')}, exit code {ended.get('exitCode')}"
    return ""


def _latest(
    facts: ClusterFacts, *, of: str = "", prefix: str = "", kind: str = "", level: str = "Warning"
) -> list[Object]:
    """Returns the events of one level about an object, or about all whose names begin with `prefix`, the newest
    first."""
    found = []
    for event in facts.events or ():
        what = event.get("involvedObject") or {}
        about = str(what.get("name", ""))
        if kind and what.get("kind") != kind:
            continue
        if event.get("type") == level and ((of and about == of) or (prefix and about.startswith(prefix))):
            found.append(event)
    return sorted(found, key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or ""), reverse=True)


_WAITING_FOR_POD = ("WaitForFirstConsumer", "WaitForPodScheduled")
"""Reasons of events that are normal for a claim whose storage class creates the volume only when a pod needs it."""


def _claims(facts: ClusterFacts) -> Iterator[Finding]:
    used = {
        str((volume.get("persistentVolumeClaim") or {}).get("claimName", ""))
        for pod in facts.pods or ()
        for volume in (pod.get("spec") or {}).get("volumes") or ()
    }
    bound = []
    for claim in facts.claims or ():
        if name(claim) not in used and label(claim, "name") != "mesh":
            continue
        phase = str((claim.get("status") or {}).get("phase", ""))
        if phase == "Bound":
            bound.append(name(claim))
            continue
        told = next(iter(_latest(facts, of=name(claim))), None)
        calm = next(iter(_latest(facts, of=name(claim), level="Normal")), None)
        if told is None and calm is not None and calm.get("reason") in _WAITING_FOR_POD:
            text = f"the volume claim {name(claim)} waits for its pod to be scheduled"
            yield AREA.warn(
                "volumes", text, "see the findings about the pod: its volume is created where the pod is scheduled"
            )
            continue
        if told is None and name(claim) not in used:
            continue  # no pod mounts it yet, as before the first snapshot
        why = str(told.get("message", "")) if told else "no volume was created for it"
        todo = "set a storage class (etcd.storage.storageClassName); kubectl get storageclass lists them"
        yield AREA.fail("volumes", f"the volume claim {name(claim)} is {phase or 'without a phase'}: {why}", todo)
    if bound:
        yield AREA.ok("volumes", f"bound: {some(bound)}")
