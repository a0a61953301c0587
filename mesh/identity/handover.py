"""The way from one authority to another that did not sign what the mesh's processes show.

Usually an authority changes in steps (`mesh.certificates`): everybody trusts both before the new one signs. But its
Secret may be deleted and made again, or filled by somebody else, and then there is nothing in common: whoever has the
new files refuses, and is refused by, whoever has not, for the minute or so in which Kubernetes brings them to the pods.

So a process that finds such files takes the steps by itself. It trusts both authorities at once, goes on showing the
certificate that the others know until the files have reached everybody, and then shows the new one. It goes on trusting
the former authority for a while, for those that are late.

Pure: the caller reads files and clocks.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mesh.identity import credentials
from mesh.identity.credentials import Credentials, IdentityError

SETTLE = 150.0
"""Seconds that a changed Secret takes to reach every pod: kubelets look every 60 to 90, and etcd's members, one after
the other, start again to trust another authority."""

KEEP = 900.0
"""Seconds after the change for which the former authority is trusted."""

_BEGIN = b"-----BEGIN CERTIFICATE-----"


@dataclass(slots=True)
class Handover:
    """What is in use, on the way to what the files hold."""

    used: Credentials
    _next: Credentials | None = field(default=None, init=False)  # what the files hold, where that differs
    _both: bytes = field(default=b"", init=False)  # the authorities of both
    _since: float = field(default=0.0, init=False)

    @property
    def under_way(self) -> bool:
        """Whether the former authority is still in use."""
        return self._next is not None

    def take(self, folder: Path, new: Credentials, now: float) -> bool:
        """Goes over to what the files hold now: at once, or in steps. Returns whether it takes steps."""
        former = self.used
        self._next = None
        if credentials.accepts(former, new):
            self.used = new
            return False
        self._next, self._since, self._both = new, now, joined(new.ca, former.ca)
        try:
            self.used = credentials.made(folder, self._both, former.certificate, former.private_key)
        except IdentityError:  # it has expired: nobody accepts it any longer
            self.used = credentials.made(folder, self._both, new.certificate, new.private_key)
        return True

    def step(self, folder: Path, now: float) -> bool:
        """Takes the step that is due by now. Returns whether there was one."""
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
    """The certificates in a PEM text, each as its lines."""
    return frozenset(b"".join(part.split()) for part in pem.split(_BEGIN)[1:])


def joined(*pems: bytes) -> bytes:
    """The authorities of several PEM texts, the first's first."""
    return b"\n".join(pem.strip() for pem in pems) + b"\n"
