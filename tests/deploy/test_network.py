"""The NetworkPolicies, compared with the tables of connections in docs/kubernetes.md."""

import itertools
from typing import Any, NamedTuple

import pytest

from deploy import manifests
from tests.deploy import installs

DOCS = manifests.ROOT.parent / "docs" / "kubernetes.md"
OURS = ("router", "runtime", "etcd", "snapshot", "certificates", "admin-key")
PORTS = (22, 53, 80, 443, 2379, 2380, 2381, 5353, 6443, 8033, 8034, 8080, 8085, 8086, 8089)


class Who(NamedTuple):
    """One end of a connection."""

    name: str
    labels: dict[str, str]
    namespace: str | None  # None is outside of the cluster


MANAGEMENT = 8034  # open only with `service.managementPort`


def rows(objects: list[dict[str, Any]] | None = None) -> list[tuple[str, str, int]]:
    """Returns the rows of the docs' two tables, one row per port. For the objects of an installation, leaves out ports
    that its values do not open."""
    found = []
    section = DOCS.read_text().split("## Who talks to whom")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "from" and not set(cells[0]) <= {"-"}:
            found += [(cells[0], cells[1], int(port)) for port in cells[2].split(",")]
    if objects is not None and not any(
        port["containerPort"] == MANAGEMENT
        for _, container in installs.containers(objects)
        for port in container.get("ports", ())
    ):
        found = [row for row in found if row[2] != MANAGEMENT]
    return found


def people(found: list[dict[str, Any]]) -> dict[str, list[Who]]:
    """Returns Mesh's pods by component, with their labels, and possible neighbours and strangers."""
    everybody: dict[str, list[Who]] = {name: [] for name in OURS}
    for name, pod in installs.pods(found):
        labels = pod["metadata"]["labels"]
        everybody[labels["app.kubernetes.io/component"]].append(Who(name, labels, manifests.NAMESPACE))
    everybody["neighbour"] = [Who("a pod of the same namespace", {"app": "other"}, manifests.NAMESPACE)]
    everybody["cluster"] = [Who("a pod of another namespace", {"app": "other"}, "elsewhere")]
    everybody["outside"] = [Who("somebody outside", {}, None)]
    return everybody


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Returns whether a selector matches labels. It understands only the selectors that the chart uses."""
    assert set(selector) <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: dict[str, Any], who: Who, home: str) -> bool:
    """Returns whether an entry of `from` or `to` matches an end of a connection."""
    if "ipBlock" in peer:
        assert peer["ipBlock"]["cidr"] == "10.0.0.0/8"
        return who.namespace is None
    if who.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": who.namespace}):
            return False
    elif who.namespace != home:
        return False
    return matches(peer.get("podSelector", {}), who.labels)


def is_port(rule: dict[str, Any], port: int, protocol: str) -> bool:
    given = rule.get("ports")
    if not given:
        return True
    return any(one.get("protocol", "TCP") == protocol and one.get("port", port) == port for one in given)


def allowed(
    policies: list[dict[str, Any]], source: Who, target: Who, port: int, protocol: str = "TCP"
) -> tuple[bool, bool]:
    """Returns whether policies let the source connect, and whether they let the target accept."""
    decisions = []
    for kind, own, peers, other in (("Egress", source, "to", target), ("Ingress", target, "from", source)):
        selecting = [
            policy["spec"]
            for policy in policies
            if own.namespace == manifests.NAMESPACE
            and kind in policy["spec"]["policyTypes"]
            and matches(policy["spec"]["podSelector"], own.labels)
        ]
        rules = [rule for spec in selecting for rule in spec.get(kind.lower(), ())]
        decisions.append(
            not selecting
            or any(
                is_port(rule, port, protocol)
                and (not rule.get(peers) or any(is_peer(peer, other, manifests.NAMESPACE) for peer in rule[peers]))
                for rule in rules
            )
        )
    return decisions[0], decisions[1]


def policies_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if one["kind"] == "NetworkPolicy"]


def test_table_is_read():
    """The tables in docs/kubernetes.md have rows, which name only existing components."""
    table = rows()
    assert len(table) >= 13
    for source, target, _ in table:
        assert source in {*OURS, "clients", "managers", "monitoring", "all"}
        assert target in {*OURS, "outside"}


# The ends that count as clients, managers and monitoring if the values name none.
MEANS = {
    **dict.fromkeys(("clients", "managers"), (*OURS, "neighbour", "cluster", "outside")),
    "monitoring": (*OURS, "neighbour", "cluster"),
}

WAYS = [pytest.param(("kustomize", name), id=f"kustomize-{name}") for name in installs.PATCHED] + [
    pytest.param(("helm", name), id=f"helm-{name}", marks=installs.needs_helm) for name in ("all-on", "external-etcd")
]


@pytest.mark.parametrize("which", WAYS)
def test_who_gets_in(which):
    """A mesh's pod accepts exactly the connections in the documented table, on exactly these ports."""
    found = installs.load(which)
    everybody, policies = people(found), policies_of(found)
    table = {
        (one, target, port)
        for source, target, port in rows(found)
        for one in MEANS.get(source, (source,))
        if target in OURS
    }
    looked = 0
    for source, target, port in itertools.product(everybody, OURS, PORTS):
        for one, other in itertools.product(everybody[source], everybody[target]):
            wanted = (source, target, port) in table
            assert allowed(policies, one, other, port)[1] is wanted, f"{one.name} to {other.name}:{port}"
            looked += 1
    assert looked >= 100


@installs.needs_helm
@pytest.mark.parametrize("values", ["all-on", "external-etcd"])
def test_who_gets_out(values: str):
    """With limited egress, a mesh's pod reaches exactly what the two documented tables name."""
    found = installs.load(("helm", values))
    everybody, policies = people(found), policies_of(found)
    table = {
        (one, target, port) for source, target, port in rows(found) for one in (OURS if source == "all" else (source,))
    }
    if values == "external-etcd":
        # An external etcd counts as outside.
        table = {(source, "outside" if target == "etcd" else target, port) for source, target, port in table}
    for source, target, port in itertools.product(OURS, everybody, PORTS):
        for one, other in itertools.product(everybody[source], everybody[target]):
            # What the table calls outside may be in the cluster too: DNS, stores, the API server.
            wanted = (source, target, port) in table or ((source, "outside", port) in table and port != 2379)
            assert allowed(policies, one, other, port)[0] is wanted, f"{one.name} to {other.name}:{port}"
    for one in everybody["router"]:
        assert allowed(policies, one, everybody["cluster"][0], 53, "UDP")[0]


@pytest.mark.parametrize("which", WAYS)
def test_every_port_is_in_the_table(which):
    """Every port that a pod opens is in the documented table, and every port in the table is open."""
    found = installs.load(which)
    named = {(target, port) for _, target, port in rows(found) if target in OURS}
    for _, pod in installs.pods(found):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in pod["spec"]["containers"]:
            opened = {(component, port["containerPort"]) for port in container.get("ports", ())}
            assert opened == {one for one in named if one[0] == component}


@installs.needs_helm
def test_named_clients():
    """If the values name clients and monitoring, nothing else may connect."""
    found = installs.rendered(
        'networkPolicy={"clients":[{"podSelector":{"matchLabels":{"app":"other"}}}],'
        '"monitoring":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}]}'
    )
    everybody, policies = people(found), policies_of(found)
    router = everybody["router"][0]
    for source, calls, reads in (
        ("neighbour", True, False),
        ("cluster", False, True),
        ("outside", False, False),
        ("runtime", False, False),
    ):
        assert allowed(policies, everybody[source][0], router, 8033)[1] is calls, source
        assert allowed(policies, everybody[source][0], router, 8089)[1] is reads, source
        assert allowed(policies, everybody[source][0], everybody["etcd"][0], 2381)[1] is reads, source


@installs.needs_helm
def test_named_managers():
    """If the values name the clients of the port for management, nothing else may connect to that port."""
    found = installs.rendered(
        'service={"managementPort":8034}',
        'networkPolicy={"managers":[{"podSelector":{"matchLabels":{"app":"other"}}}]}',
    )
    everybody, policies = people(found), policies_of(found)
    for source, manages in (("neighbour", True), ("cluster", False), ("outside", False)):
        assert allowed(policies, everybody[source][0], everybody["router"][0], MANAGEMENT)[1] is manages, source
        assert allowed(policies, everybody[source][0], everybody["router"][0], 8033)[1]


def test_neighbours_are_left_alone():
    """No policy of the base selects pods of other applications."""
    for policy in policies_of(installs.patched("base")):
        assert not matches(policy["spec"]["podSelector"], {"app": "other"})
