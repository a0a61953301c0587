"""`python -m mesh.etcdserver.member`: runs etcd, as a member of the cluster that `ETCD_...` variables describe.

A member with data simply starts. A member whose volume was lost cannot: the others still list its name, and etcd
refuses to start it ("has already been bootstrapped"). A member without data therefore first asks the others (with
`etcdctl`, configured by `ETCDCTL_...` variables). If this member has served before, it is removed from their list and
added again, as etcd's manual advises. It then starts as a new member that fetches everything from the others.

Without a quorum, the others cannot change the list. This process then waits; it never starts a second cluster next to
an existing one. In a new cluster no member has ever served. The members' peer ports say so even without a quorum
(etcd's own check asks there too). If no member answers at all, this may be the first start, and etcd decides as usual.
If most members of a cluster have lost their data, an operator must restore it from a snapshot. See docs/kubernetes.md.

With TLS, this process runs etcd as a child. It copies the folder that MESH_ETCD_CERTIFICATES names to the folder in
etcd's own variables, and follows changes (`mesh.etcdserver.certificates`). Without TLS, etcd replaces this process.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.etcdserver import certificates
from mesh.process import find_binary
from mesh.telemetry import logs

log = logs.get("mesh.etcdserver.member")

COMMAND_TIMEOUT = 5.0
"""Seconds for the others to answer. At the first start of a cluster, no member answers, so that start takes this much
longer."""

PATIENCE = 60.0
"""Seconds for which this process retries if the others refuse. Then it ends, and Kubernetes starts it again."""

_PAUSE = 2.0


class MemberError(Exception):
    """A request that the other members have not fulfilled. The text says why."""


@dataclass(frozen=True, slots=True)
class ListedMember:
    """One member, as the others list it."""

    id: int
    name: str  # empty: added, and never started
    peer_urls: tuple[str, ...]
    served: bool  # it has published its address for clients

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "ListedMember":
        """Converts an entry of etcdctl's JSON."""
        return cls(
            int(fields["ID"]),
            str(fields.get("name", "")),
            tuple(fields.get("peerURLs") or ()),
            bool(fields.get("clientURLs")),
        )


def entries() -> list[ListedMember] | None:
    """Returns the members that a majority lists, or None if there is no usable answer."""
    try:
        said = _etcdctl("member", "list", "--write-out=json")
        return [ListedMember.of(fields) for fields in json.loads(said)["members"]]
    except MemberError as error:
        log.info("no cluster answers", why=str(error))
    except (ValueError, KeyError, TypeError) as error:
        log.warning("the list of members cannot be read", why=repr(error))
    return None


def joins(name: str, peer_url: str, listed: list[ListedMember]) -> bool:
    """Prepares the start of a member without data. Returns True if the member joins an existing cluster, whose list
    then contains it as a new member. Returns False if it starts a new cluster together with the others. Raises
    MemberError."""
    ours = next((entry for entry in listed if peer_url in entry.peer_urls or entry.name == name), None)
    if ours is not None and ours.name and not ours.served:
        return False  # from the first list of a cluster that is being made
    if ours is not None:  # even without a name, as it may have served before it could publish one
        log.warning("this member has no data: it joins the others as a new member", member=name, was=f"{ours.id:x}")
        _etcdctl("member", "remove", f"{ours.id:x}")
    _etcdctl("member", "add", name, f"--peer-urls={peer_url}")
    return True


def has_data(folder: Path) -> bool:
    """Returns whether the folder contains a write-ahead log, from which the member can continue. (Other files may
    remain from a failed start.)"""
    return any((folder / "member" / "wal").glob("*.wal"))


def exists(others: Iterable[str], tls: ssl.SSLContext | None) -> bool:
    """Returns whether one of the others knows a member that has served. Asks them at their peer URLs, which needs no
    quorum."""
    for url in others:
        try:
            with urllib.request.urlopen(f"{url}/members", timeout=2.0, context=tls) as answer:
                if any(fields.get("clientURLs") for fields in json.load(answer)):
                    return True
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.info("a member does not answer with its list of members", url=url, why=str(error))
    return False


def _joins_in_time(name: str, peers: Mapping[str, str], tls: ssl.SSLContext | None) -> bool:
    """Repeats `joins` while the others have no quorum or admit no member. (Members admit another only after they have
    been connected to each other for five seconds.) Raises MemberError after `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    others = [url for other, url in peers.items() if other != name]
    known = False
    while True:
        listed = entries()
        if listed is None and not known and not exists(others, tls):
            return False
        known = True
        try:
            if listed is None:
                raise MemberError("the other members have no quorum: check that most members run")
            return joins(name, peers[name], listed)
        except MemberError as error:
            if time.monotonic() > end:
                raise
            log.info("waiting: the other members do not let this one join yet", why=str(error))
            time.sleep(_PAUSE)


def _peer_tls(environment: Mapping[str, str]) -> ssl.SSLContext | None:
    """Returns the TLS settings between members, or None without TLS. Raises OSError for files that cannot be read."""
    if not (ca := environment.get("ETCD_PEER_TRUSTED_CA_FILE")):
        return None
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(environment["ETCD_PEER_CERT_FILE"], environment["ETCD_PEER_KEY_FILE"])
    return context


def _etcdctl(*argv: str) -> str:
    command = [find_binary("etcdctl"), f"--command-timeout={COMMAND_TIMEOUT:g}s", "--dial-timeout=2s", *argv]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * COMMAND_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise MemberError(f"etcdctl {argv[1]} did not end within {3 * COMMAND_TIMEOUT:g} s") from error
    if done.returncode != 0:
        ended = f"etcdctl {argv[1]} ended with status {done.returncode} and printed no error"
        raise MemberError((done.stderr.strip() or ended).splitlines()[-1])
    return done.stdout


def _copies(environment: Mapping[str, str]) -> certificates.Copies | None:
    """Returns the copies of the certificates that etcd reads, or None if certificates are not followed. Raises
    OSError."""
    if not (source := environment.get("MESH_ETCD_CERTIFICATES")):
        return None
    return certificates.Copies(Path(source), Path(environment["ETCD_TRUSTED_CA_FILE"]).parents[1])


def _turn(name: str) -> float:
    """Returns the delay before this member's restarts, in seconds, which depends on the number in its name."""
    digits = name.rpartition("-")[2]
    return certificates.TURN * int(digits) if digits.isdigit() else 0.0


def main() -> None:
    """Runs etcd as a child, or replaces this process with it. If that fails, logs the reason and exits with 1. Never
    returns."""
    logs.configure(level="info", fmt="json", process="etcd-member")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a container's first process has no other way to end
    environment = dict(os.environ)
    try:
        name, data = environment["ETCD_NAME"], Path(environment["ETCD_DATA_DIR"])
        peers = dict(pair.split("=", 1) for pair in environment["ETCD_INITIAL_CLUSTER"].split(","))
        peers[name] = environment["ETCD_INITIAL_ADVERTISE_PEER_URLS"]
    except (KeyError, ValueError) as error:
        invalid = "ETCD_INITIAL_CLUSTER is not a list of NAME=URL"
        why = f"{error.args[0]} is not set" if isinstance(error, KeyError) else invalid
        sys.exit(f"mesh.etcdserver.member: {why}. This command starts the etcd of the Helm chart, which sets it")
    try:
        etcd = find_binary("etcd")
        copies = _copies(environment)
        if len(peers) > 1 and not has_data(data) and _joins_in_time(name, peers, _peer_tls(environment)):
            environment["ETCD_INITIAL_CLUSTER_STATE"] = "existing"
    except (MemberError, OSError) as error:
        log.error("this member cannot start", why=str(error))
        sys.exit(1)
    if copies is not None:
        sys.exit(certificates.run([etcd], environment, copies, delay=_turn(name)))
    try:
        os.execve(etcd, ["etcd"], environment)
    except OSError as error:
        log.error("etcd does not start: check that the program is made for this machine", program=etcd, why=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
