"""`python -m mesh.etcdmember`: becomes etcd, as a member of the cluster that its environment describes (`ETCD_...`).

etcd starts by itself wherever its data are. What it cannot do is to come back without them: a member whose volume was
lost has the name of one that the others still count on, and etcd refuses to start it ("has already been
bootstrapped"), for ever. So where there are no data, the others are asked first (`etcdctl`, by its `ETCDCTL_...`). If
they know this member as one that has served, it is taken off their list and put on it again, which is what etcd's
manual asks of an operator, and starts as a new one that fetches everything from them.

Nothing of that happens while the others have no quorum, as they cannot agree to it then; a cluster that has lost most
of its data is restored from a snapshot, by a person. See docs/kubernetes.md.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.process import find_binary
from mesh.telemetry import logs

log = logs.get("mesh.etcdmember")

COMMAND_TIMEOUT = 5.0
"""Seconds for the others to answer. On a first start nobody does, and this is what it takes longer."""

PATIENCE = 60.0
"""Seconds that they may refuse it. Then this process ends, and Kubernetes starts it again."""

_PAUSE = 2.0


class MemberError(Exception):
    """What the others were asked for they have not done. The text is etcdctl's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One member, as the others list it."""

    id: int
    name: str  # empty: added, and never started
    peer_urls: tuple[str, ...]
    served: bool  # it has told for which address clients call it

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Entry":
        """From etcdctl's JSON."""
        return cls(
            int(fields["ID"]),
            str(fields.get("name", "")),
            tuple(fields.get("peerURLs") or ()),
            bool(fields.get("clientURLs")),
        )


def entries() -> list[Entry] | None:
    """The members as those that have a quorum list them; None where nobody tells."""
    try:
        said = _etcdctl("member", "list", "--write-out=json")
        return [Entry.of(fields) for fields in json.loads(said)["members"]]
    except MemberError as error:
        log.info("no cluster answers", why=str(error))
    except (ValueError, KeyError, TypeError) as error:
        log.warning("the list of members cannot be read", why=repr(error))
    return None


def joins(name: str, peer_url: str, listed: list[Entry]) -> bool:
    """Has a member without data put on the list anew where it must be. Whether it then joins a cluster that exists,
    rather than being one of those that make a new one. Raises MemberError."""
    ours = next((entry for entry in listed if peer_url in entry.peer_urls), None)
    if ours is not None and not ours.served:
        return not ours.name  # named: from the first list of a cluster that is being made
    if ours is not None:
        log.warning("this member's data are gone: it joins the others as a new one", member=name, was=f"{ours.id:x}")
        _etcdctl("member", "remove", f"{ours.id:x}")
    _etcdctl("member", "add", name, f"--peer-urls={peer_url}")
    return True


def _joins_in_time(name: str, peer_url: str) -> bool:
    """The same as `joins`, asked again: others who have not been connected to each other for five seconds, such as
    after an election, agree to no change. Raises MemberError after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while (listed := entries()) is not None:
        try:
            return joins(name, peer_url, listed)
        except MemberError as error:
            if time.monotonic() > end:
                raise
            log.info("the other members do not let this one join yet", why=str(error))
            time.sleep(_PAUSE)
    return False


def _etcdctl(*argv: str) -> str:
    """What it prints. Raises MemberError."""
    command = [find_binary("etcdctl"), f"--command-timeout={COMMAND_TIMEOUT:g}s", "--dial-timeout=2s", *argv]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * COMMAND_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise MemberError(f"etcdctl {argv[1]} does not end") from error
    if done.returncode != 0:
        raise MemberError((done.stderr.strip() or f"etcdctl ended with {done.returncode}").splitlines()[-1])
    return done.stdout


def main() -> None:
    """Never returns: this process becomes etcd, or ends with 1 and the reason in its log."""
    logs.configure(level="info", fmt="json", process="etcd-member")
    environment = dict(os.environ)
    try:
        name, data = environment["ETCD_NAME"], Path(environment["ETCD_DATA_DIR"])
        peer_url = environment["ETCD_INITIAL_ADVERTISE_PEER_URLS"]
        alone = "," not in environment["ETCD_INITIAL_CLUSTER"]
    except KeyError as error:
        sys.exit(f"mesh.etcdmember: {error.args[0]} is not set; it starts a member of the chart's etcd")
    try:
        if not alone and not (data / "member").exists() and _joins_in_time(name, peer_url):
            environment["ETCD_INITIAL_CLUSTER_STATE"] = "existing"
    except MemberError as error:
        log.error("the other members do not let this one join", why=str(error))
        sys.exit(1)
    os.execve(find_binary("etcd"), ["etcd"], environment)


if __name__ == "__main__":
    main()
