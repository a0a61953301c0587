"""Detection of pods that a rolling update is about to replace, so that new copies go to pods that will stay.

The mesh is not notified of a rollout, but can recognise it by the pods. A deployment's pods come in groups (on
Kubernetes a ReplicaSet, the part of the name before the last dash), and during an update there are a new and an old
group. A group counts as outgoing if its deployment has another group with the same labels that has a pod younger than
`LASTS_MS`, and whose pods are all younger than the youngest of the outgoing group. A group that still grows therefore
does not count. Because only ages count, this state ends by itself, even if a rollout stops halfway or is undone.

Outgoing pods are avoided, never forbidden: see `choice`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LASTS_MS = 20 * 60_000
"""Time after the start of the new group's last pod for which the old group counts as outgoing; ModelMesh's
figure."""

_MEMBER = re.compile(r"(?P<deployment>.+)-(?P<template>[a-z0-9]{5,10})-[a-z0-9]{5}")


@dataclass(frozen=True, slots=True)
class Member:
    """A pod of the mesh."""

    name: str
    age_ms: int  # since it started
    labels: frozenset[str] = frozenset()


def group_of(name: str) -> tuple[str, str] | None:
    """Returns the deployment and the group of a pod, by its name, or None if the name has no such parts."""
    match = _MEMBER.fullmatch(name)
    return None if match is None else (match["deployment"], match["template"])


def outgoing(members: Iterable[Member]) -> dict[str, str]:
    """Returns the pods that are being replaced, each with the reason as it follows the pod's name."""
    groups: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        group = group_of(member.name)
        if group is not None:
            groups.setdefault(group, []).append(member)
    found: dict[str, str] = {}
    for (deployment, template), old in groups.items():
        youngest = min(member.age_ms for member in old)
        labels = {member.labels for member in old}
        for (other_deployment, other_template), new in groups.items():
            if other_deployment != deployment or other_template == template:
                continue
            if labels.isdisjoint(member.labels for member in new):
                continue
            ages = [member.age_ms for member in new]
            if min(ages) < LASTS_MS and max(ages) < youngest:
                why = f"is being replaced by the pods of {deployment}-{other_template}"
                found |= {member.name: why for member in old}
    return found
