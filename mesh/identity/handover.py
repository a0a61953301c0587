"""The handover from one authority to another that did not sign the certificates in use.

Usually an authority changes in steps (`mesh.certificates`), and every process trusts both authorities before the new
one signs. But the Secret may be deleted and created again, or written by another program. Then the old and the new
files have no authority in common. Processes with new files and processes with old files would refuse each other for the
minute or so that Kubernetes takes to deliver the files.

A process that finds such files therefore performs the steps itself. It trusts both authorities immediately. It presents
the old certificate until the files have reached all pods, and then the new one. It trusts the old authority for some
time after that, for pods that receive the files late.

This module is pure. Its caller reads files and clocks.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mesh.identity import credentials
from mesh.identity.credentials import Credentials, IdentityError

SETTLE = 150.0
"""Seconds in which a changed Secret reaches every pod: kubelets check every 60 to 90 seconds, and etcd's members
restart one after the other to trust another authority."""

KEEP = 900.0
"""Seconds after the change for which the former authority is trusted."""

_BEGIN = b"-----BEGIN CERTIFICATE-----"


@dataclass(slots=True)
class Handover:
    """The credentials in use, and the steps from these to the credentials in the files."""

    used: Credentials
    _next: Credentials | None = field(default=None, init=False)  # the content of the files, if it differs
    _both: bytes = field(default=b"", init=False)  # the authorities of both
    _since: float = field(default=0.0, init=False)

    @property
    def under_way(self) -> bool:
        """True while the former authority is still in use."""
        return self._next is not None

    def take(self, folder: Path, new: Credentials, now: float) -> bool:
        """Switches to new credentials, immediately or in steps. Returns whether steps are needed."""
        former = self.used
        self._next = None
        if credentials.accepts(former, new):
            self.used = new
            return False
        self._next, self._since, self._both = new, now, joined(new.ca, former.ca)
        try:
            self.used = credentials.made(folder, self._both, former.certificate, former.private_key)
        except IdentityError:  # it has expired: no process accepts it any longer
            self.used = credentials.made(folder, self._both, new.certificate, new.private_key)
        return True

    def step(self, folder: Path, now: float) -> bool:
        """Performs the step that is due. Returns False if none is due."""
        if (new := self._next) is None:
            return False
        if now >= self._since + KEEP:
            self.used, self._next = new, None
            return True
        if now >= self._since + SETTLE and self.used.certificate != new.certificate:
            self.used = credentials.made(folder, self._both, new.certificate, new.private_key)
            return True
        return False


def authorities(pem: bytes) -> frozenset[bytes]:
    """Splits a PEM text into its certificates. Differences in white space do not count."""
    return frozenset(b"".join(part.split()) for part in pem.split(_BEGIN)[1:])


def joined(*pems: bytes) -> bytes:
    """Joins the authorities of several PEM texts, in their order."""
    return b"\n".join(pem.strip() for pem in pems) + b"\n"
