"""The certificate that Envoy presents to clients, and the check of an operator's files before Envoy reads them.

Envoy accepts every file that appears in a folder it watches. An expired certificate would silently replace a valid one,
and every client would fail to connect. So Envoy does not watch the operator's folder. It reads copies, one file for
each secret, in the router's folder. A copy is replaced, by a rename, only if the new files work: the key matches, the
certificate is valid now, and the authorities can sign clients' certificates. Otherwise the current files stay in use.
A log line and a metric report that, because the router's next start would fail.

`config` tells Envoy to read the copies; `mesh.identity.credentials` defines what counts as expired.
"""

import asyncio
import contextlib
import datetime
import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mesh.envoy import config
from mesh.identity import credentials
from mesh.process.tasks import turned
from mesh.telemetry import logs, metrics

log = logs.get(__name__)

_LOOK = 2.0  # seconds between two looks at the files

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Files:
    """The certificate, its key and the authorities for clients, as read from files that work."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes
    expires: float  # seconds since the epoch


def read(tls: config.Tls) -> Files:
    """Reads the files. Raises ValueError if the files do not work. The text says why and what to do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # If a file holds both, Envoy takes the part that its option names.
        certificate = _blocks(Path(tls.certificate).read_bytes(), b"CERTIFICATE")
        private_key = _blocks(Path(tls.private_key).read_bytes(), b"PRIVATE KEY")
        credentials.load_chain(context, certificate + private_key)
    except (OSError, ValueError) as error:  # also OpenSSL's
        pair = f"the certificate {tls.certificate} does not work with the key {tls.private_key}"
        raise ValueError(f"{pair}: {_reason(error)}") from error
    begins, expires = _validity(certificate)
    what = ""
    if ended := credentials.expired(certificate):
        what = ended
    elif begins > time.time():
        what = f"is not valid before {datetime.datetime.fromtimestamp(begins, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    if what:
        raise ValueError(
            f"the certificate {tls.certificate} {what}, so clients would refuse it: replace the file with a valid one "
            "(on Kubernetes, update the Secret that tls.secretName names)"
        )
    client_ca = b""
    if tls.client_ca:
        try:
            client_ca = Path(tls.client_ca).read_bytes()
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
            ended = credentials.expired(client_ca, None)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{tls.client_ca} cannot be used as the certificate authority for clients: {_reason(error)}"
            ) from error
        if ended:
            raise ValueError(
                f"the certificate authority {tls.client_ca} {ended}, so no client's certificate could be verified: "
                "replace the file with a valid one"
            )
    return Files(certificate, private_key, client_ca, expires)


def _blocks(pem: bytes, kind: bytes) -> bytes:
    """Returns the PEM blocks of one kind, without any text between them."""
    return b"".join(block[0] + b"\n" for block in _BLOCK.finditer(pem) if block[1].endswith(kind))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read: {error.strerror}"
    return str(getattr(error, "strerror", None) or credentials.reason(error))


def _validity(certificate: bytes) -> tuple[float, float]:
    from cryptography import x509  # megabytes, only if clients call over TLS

    first = x509.load_pem_x509_certificates(certificate)[0]
    return first.not_valid_before_utc.timestamp(), first.not_valid_after_utc.timestamp()


class Certificates:
    """Copies of the files that `tls` names, in `folder`, which must be private to this user."""

    def __init__(self, tls: config.Tls, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._tls = tls
        self._folder = folder
        self._clock = clock
        self._stamp: Stamp | None = None
        self._files: Files | None = None
        self.refusal = ""
        """The reason why the newest files are not used, or "" if they are used."""

    @property
    def expires_in(self) -> float:
        """Seconds until the certificate in use expires; negative once it has expired."""
        return (self._files.expires if self._files is not None else 0.0) - self._clock()

    def start(self) -> None:
        """Makes the copies. Raises ValueError if the files do not work, because Envoy could then serve no client."""
        stamp = self._look()
        self._take(read(self._tls), stamp)

    def look(self) -> bool:
        """Copies changed files if all of them work, and returns whether they were copied. Logs files that do not work,
        once for each reason."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        try:
            files = read(self._tls)
        except ValueError as error:
            # The two files of a pair may change one after the other, so an invalid pair is read again at each look.
            if str(error) != self.refusal:
                log.warning("the new edge certificate cannot be used, the old one stays in use", why=str(error))
            self.refusal = str(error)
            return False
        if self._look() != stamp:  # they changed while they were read: the next look sees it
            return False
        self.refusal = ""
        if files == self._files:
            self._stamp = stamp
            return False
        self._take(files, stamp)
        log.info("edge certificate was replaced", expires_in_days=round(self.expires_in / 86400, 1))
        return True

    async def run(self) -> None:
        """Checks the files periodically, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            self.look()
            turned()

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metrics of the certificates."""
        registry.gauge(
            "mesh_edge_certificate_expires_seconds",
            "Seconds until the certificate presented to clients expires.",
            merge="min",
        ).follow(lambda: round(self.expires_in))
        registry.gauge(
            "mesh_edge_certificate_refused",
            "1 if newer files for the edge's certificate cannot be used and the old ones stay in use.",
            merge="max",
        ).follow(lambda: int(bool(self.refusal)))

    def _look(self) -> Stamp | None:
        """Returns the current state of the files without reading them, or None if one is missing."""
        found = []
        with contextlib.suppress(OSError):
            for path in filter(None, (self._tls.certificate, self._tls.private_key, self._tls.client_ca)):
                status = os.stat(path)
                found.append((status.st_dev, status.st_ino, status.st_mtime_ns))
            return tuple(found)
        return None

    def _take(self, files: Files, stamp: Stamp | None) -> None:
        for name, content in config.secrets(files.certificate, files.private_key, files.client_ca).items():
            fresh = self._folder / f"{name}.new"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(fresh, self._folder / name)  # Envoy sees renames
        self._files, self._stamp = files, stamp
