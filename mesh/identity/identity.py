"""The identity of a process: the credentials in its folder, which are read again when they change.

Changes apply to new connections, and existing ones stay open. Files that do not match each other are ignored until they
do, because a certificate that is about to expire is better than none. While an authority is being replaced, ca.crt may
contain both the old and the new authority. If ca.crt contains only the new one, the process performs the steps of the
replacement itself (`handover`).

A listening socket keeps the TLS context that it was created with. That context therefore passes each handshake to the
newest context.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh.identity import credentials
from mesh.identity.credentials import NAME, Credentials, IdentityError
from mesh.identity.handover import SETTLE, Handover
from mesh.process.tasks import turned
from mesh.telemetry import logs, metrics

log = logs.get(__name__)

_LOOK = 2.0  # seconds; Kubernetes itself takes a minute to deliver a changed Secret


@dataclass(frozen=True, slots=True)
class IdentityStatistics:
    """The state of an identity."""

    changes: int  # since the start
    expires_in: float  # seconds
    refusal: str  # why newer files are not used; empty: there are none


class Identity:
    """The identity of a process. `run` follows the files; without it, the files are read only once."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the folder. `clock` is for dates, `elapsed` for durations. Raises IdentityError."""
        self.folder = folder
        self._clock = clock
        self._elapsed = elapsed
        first, self._stamp = credentials.read(folder)
        self._handover = Handover(first)
        self._refused: credentials.Stamp | None = None
        self._refusal = ""
        self.changes = 0
        now = first
        self.accepting = credentials.context(folder, ssl.PROTOCOL_TLS_SERVER, now.ca, now.certificate, now.private_key)
        """The context for a listening socket, valid for as long as the socket is open."""
        self.accepting.sni_callback = self._newest  # the callback also runs if the handshake has no name

    @property
    def current(self) -> Credentials:
        """The newest valid credentials."""
        return self._handover.used

    @property
    def connecting(self) -> ssl.SSLContext:
        """The TLS context for the next connection. The peer must have the name NAME."""
        return self.current.connecting

    @property
    def expires_in(self) -> float:
        """Seconds until the certificate expires, negative once it has expired."""
        return self.current.expires - self._clock()

    def statistics(self) -> IdentityStatistics:
        """Returns the current state."""
        return IdentityStatistics(self.changes, self.expires_in, self._refusal)

    def look(self) -> bool:
        """Reads changed files and uses their credentials. Returns whether the credentials in use have changed. Logs
        invalid files once, and tries them again."""
        found = None
        try:
            found = credentials.stamp(self.folder)
            if found == self._stamp:
                self._refusal, self._refused = "", None
                return self._step()
            new, self._stamp = credentials.read(self.folder)
            in_steps = self._handover.take(self.folder, new, self._elapsed())
        except IdentityError as error:
            if found != self._refused or str(error) != self._refusal:
                log.warning(
                    "the old certificate for TLS inside the mesh stays in use: the new files are invalid",
                    why=str(error),
                )
            self._refused, self._refusal = found, str(error)
            return self._step()
        self._refusal, self._refused = "", None
        self.changes += 1
        if in_steps:
            log.warning(
                "the files have another authority, which did not sign the certificates that the mesh's processes "
                "present: both authorities are trusted for now, and the new certificate is presented once the files "
                "have reached all pods",
                folder=str(self.folder),
                shown_in_seconds=SETTLE,
            )
            return True
        log.info(
            "the certificate for TLS inside the mesh was replaced", expires_in_days=round(self.expires_in / 86400, 1)
        )
        return True

    def _step(self) -> bool:
        """Performs a step towards another authority, if one is due."""
        if not self._handover.step(self.folder, self._elapsed()):
            return False
        self.changes += 1
        if self._handover.under_way:
            log.info("the certificate of the new authority is presented; the old authority is still trusted")
        else:
            log.info("the handover to the new authority has ended; the old authority is no longer trusted")
        return True

    async def run(self) -> None:
        """Checks the files periodically, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            self.look()
            turned()

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metric of the certificate's expiry. For several processes together, the metric has the earliest
        expiry."""
        registry.gauge(
            "mesh_internal_certificate_expires_seconds",
            "Seconds until the certificate for TLS inside the mesh expires.",
            merge="min",
        ).follow(lambda: round(self.expires_in))

    def _newest(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self.current.accepting


def known(shown: Mapping[str, object] | None) -> bool:
    """Returns whether a peer's certificate, in Python's form, has the mesh's name. The signature must have been checked
    before."""
    names = (shown or {}).get("subjectAltName", ())
    return isinstance(names, tuple) and ("DNS", NAME) in names
