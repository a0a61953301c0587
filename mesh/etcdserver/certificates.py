"""The certificates of a member of the chart's etcd, and the restarts of etcd after changes that etcd does not follow
itself.

etcd reads its certificate at each handshake, but its trusted authorities only when it starts. So etcd reads copies of
the files in a separate folder, which change in the steps of `mesh.identity.handover`. When an authority is added, etcd
is restarted, one member after the other. No connection between etcd and its clients is refused meanwhile, even if the
mesh's Secret was deleted and created again.

Files that are invalid at the start are passed on unchanged. etcd then refuses connections, and its log gives the
reason.
"""

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mesh import process
from mesh.identity import credentials, handover
from mesh.identity.credentials import FILES, IdentityError, Stamp
from mesh.telemetry import logs

log = logs.get(__name__)

LOOK = 2.0
"""Seconds between two checks of the files."""

TURN = 15.0
"""Seconds between the restarts of two members. A member needs 2 to 5 seconds until it serves again."""

_ENDING = 30.0  # seconds that etcd gets to transfer its leadership and end
_CURRENT, _VERSION = "current", "version-"


class Copies:
    """Copies of the files of a mounted folder, in a folder that etcd reads. Methods block. Call `look` periodically."""

    def __init__(self, source: Path, target: Path, *, elapsed: Callable[[], float] = time.monotonic) -> None:
        """Makes the first copies. Raises OSError if there is nothing to copy."""
        self.source = source
        self.folder = target / _CURRENT
        self._target = target
        self._elapsed = elapsed
        self._handover: handover.Handover | None = None
        self._stamp: Stamp | None = None
        self._refusal = ""
        self._written: tuple[bytes, ...] = ()
        target.mkdir(parents=True, exist_ok=True)
        self.look()
        if not self._written:
            self._write(*((source / name).read_bytes() for name in FILES))

    @property
    def authorities(self) -> frozenset[bytes]:
        """The authorities that etcd is to trust."""
        return handover.authorities(self._written[0])

    def look(self) -> None:
        """Copies changed files, and performs the handover's steps that are due. Logs invalid files once."""
        now = self._elapsed()
        try:
            found = credentials.stamp(self.source)
            if found != self._stamp:
                self._take(now)
            self._refusal = ""
        except IdentityError as error:
            if str(error) != self._refusal:
                log.warning("the old certificates stay in use: the new files cannot be used", why=str(error))
            self._refusal = str(error)
        if self._handover is None:
            return
        if self._handover.step(self.source, now):
            log.info("one more step to the new authority was taken", former_trusted=self._handover.under_way)
        used = self._handover.used
        if (used.ca, used.certificate, used.private_key) != self._written:
            self._write(used.ca, used.certificate, used.private_key)

    def _take(self, now: float) -> None:
        new, stamp = credentials.read(self.source)
        if self._handover is None:
            self._handover = handover.Handover(new)
        elif self._handover.take(self.source, new, now):
            log.warning(
                "the files have another authority, which did not sign the certificates that etcd's clients present: "
                "both authorities are trusted for now, and the new certificate is presented when the files have "
                "reached all processes",
                folder=str(self.source),
                shown_in_seconds=handover.SETTLE,
            )
        self._stamp = stamp

    def _write(self, *contents: bytes) -> None:
        """Replaces all files at once, by one rename, as Kubernetes does."""
        fresh = self._target / f"{_VERSION}{time.monotonic_ns()}"
        fresh.mkdir(mode=0o700)
        for name, content in zip(FILES, contents, strict=True):
            with open(os.open(fresh / name, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
                file.write(content)
        link = self._target / "new"
        link.unlink(missing_ok=True)
        link.symlink_to(fresh.name)
        os.replace(link, self.folder)
        self._written = contents
        for old in self._target.glob(f"{_VERSION}*"):
            if old != fresh:
                shutil.rmtree(old, ignore_errors=True)


def run(argv: Sequence[str], environment: Mapping[str, str], copies: Copies, *, delay: float = 0.0) -> int:
    """Runs etcd until it ends by itself, or by SIGTERM or SIGINT, and restarts it when there is a new authority.
    Returns etcd's exit status, or, after a signal, 128 plus the signal's number.

    `delay` is the number of seconds before a restart for a changed authority. It must differ between members.
    """
    trusted = copies.authorities
    child = subprocess.Popen(process.tethered(argv), env=environment)
    ending = False
    due: float | None = None

    def end(number: int, _: object) -> None:
        nonlocal ending
        ending = True
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while True:
        if _ended(child, LOOK):
            return child.returncode if child.returncode >= 0 else 128 - child.returncode
        copies.look()
        if copies.authorities <= trusted:
            due = None
        elif due is None:
            due = time.monotonic() + delay
            log.warning(
                "etcd is about to restart: it trusts a new authority only after a restart", in_seconds=round(delay, 1)
            )
        elif time.monotonic() >= due and not ending:
            child.terminate()
            if not _ended(child, _ENDING):
                child.kill()
            child.wait()
            if ending:
                return 143
            trusted, due = copies.authorities, None
            child = subprocess.Popen(process.tethered(argv), env=environment)
            log.info("etcd was restarted and trusts the new authority")


def _ended(child: "subprocess.Popen[bytes]", timeout: float) -> bool:
    """Waits until etcd has ended. Returns False after `timeout` seconds."""
    if child.poll() is not None:
        return True
    descriptor = os.pidfd_open(child.pid)
    try:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        waiting.poll(timeout * 1000.0)
    finally:
        os.close(descriptor)
    return child.poll() is not None
