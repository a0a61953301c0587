"""A connection made step by step, to find out why a client cannot connect.

gRPC and HTTP clients only say "failed to connect". This module opens a plain socket, then makes a TLS handshake with
the client's authorities and certificate. Then it sends the first bytes of HTTP/2, because with TLS 1.3 a server refuses
a client only after the handshake. It reads the server's certificate even if the certificate is not trusted.
"""

import asyncio
import contextlib
import enum
import socket
import ssl
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from mesh.cli.doctor import certificates
from mesh.cli.doctor.certificates import Certificate

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and an empty SETTINGS frame

_CLOSED = "it closes the connection"

# OpenSSL's X509_V_ERR_...
_NOT_YET, _EXPIRED = (9, 13), (10, 14)
_OTHER_NAME = (62, 64)
_UNTRUSTED = (2, 18, 19, 20, 21)


class Trouble(enum.Enum):
    """The reason why a connection fails."""

    NONE = "it answers"
    UNRESOLVED = "its name cannot be resolved"
    REFUSED = "nothing listens there"
    SILENT = "it does not answer"
    NO_TLS = "it does not speak TLS"
    WANTS_TLS = "it only speaks TLS"
    UNTRUSTED = "its certificate is from an authority that is not trusted"
    EXPIRED = "its certificate has expired"
    NOT_YET = "its certificate is not valid yet"
    OTHER_NAME = "its certificate is for another name"
    REFUSES_US = "it refuses the client's certificate, or requires one"
    OTHER = "the connection fails"


@dataclass(frozen=True, slots=True)
class Handshake:
    """The result of an attempt to connect."""

    trouble: Trouble
    text: str = ""  # the system's error
    certificate: Certificate | None = None  # the server's, trusted or not

    @property
    def names(self) -> str:
        """The names of the server's certificate, for people."""
        return ", ".join(self.certificate.names) if self.certificate and self.certificate.names else "no name at all"


@dataclass(frozen=True, slots=True)
class Identity:
    """The authorities that a client trusts and the certificate that it presents, in PEM."""

    ca: bytes | None = None  # None: the system's
    certificate: bytes | None = None
    private_key: bytes | None = None


async def ask(
    host: str, port: int, *, tls: bool, identity: Identity, name: str = "", timeout: float = 5.0
) -> Handshake:
    """Calls `connect` in a thread, and returns its result within `timeout` seconds."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Handshake] = loop.create_future()

    def done(found: Handshake | Exception) -> None:
        if answer.done():
            return
        if isinstance(found, Handshake):
            answer.set_result(found)
        else:
            answer.set_exception(found)

    def work() -> None:
        found: Handshake | Exception
        try:
            found = connect(host, port, tls=tls, identity=identity, name=name, timeout=timeout / 2)
        except Exception as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done, found)

    # A daemon thread: DNS may be slow, cannot be interrupted, and must not delay Ctrl-C.
    threading.Thread(target=work, name=f"handshake {host}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout):
            return await answer
    except TimeoutError:
        return Handshake(Trouble.SILENT, f"no answer within {timeout:g} s")


def connect(host: str, port: int, *, tls: bool, identity: Identity, name: str = "", timeout: float = 5.0) -> Handshake:
    """Tries to connect. Blocks for a few times `timeout` seconds at most. The certificate must have `name`, or the host
    if that is ""."""
    try:
        plain = socket.create_connection((host, port), timeout)
    except socket.gaierror as error:
        return Handshake(Trouble.UNRESOLVED, str(error))
    except ConnectionRefusedError as error:
        return Handshake(Trouble.REFUSED, str(error))
    except TimeoutError as error:
        return Handshake(Trouble.SILENT, str(error))
    except OSError as error:
        return Handshake(Trouble.OTHER, error.strerror or str(error))
    with plain:
        if not tls:
            answer = _plain(plain)
            closed = answer.text == _CLOSED and _shown(host, port, identity, timeout) is not None
            return Handshake(Trouble.WANTS_TLS) if closed else answer
        try:
            context = _context(identity)
            with context.wrap_socket(plain, server_hostname=name or host) as secure:
                shown = secure.getpeercert(binary_form=True)
                _first_bytes(secure)
                return Handshake(Trouble.NONE, certificate=_read(shown))
        except (OSError, ValueError) as error:  # ssl's errors and timeouts are OSErrors
            trouble = _why(error)
            text = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error)
    if trouble is Trouble.OTHER and connect(host, port, tls=False, identity=identity, timeout=timeout).trouble is (
        Trouble.NONE
    ):  # without TLS, etcd just closes a connection that begins with it
        return Handshake(Trouble.NO_TLS)
    # Connects again without verification, for the server's certificate.
    return Handshake(trouble, str(text), _shown(host, port, identity, timeout))


def _plain(connection: socket.socket) -> Handshake:
    try:
        first = _first_bytes(connection)
    except TimeoutError as error:
        return Handshake(Trouble.SILENT, str(error))
    except OSError as error:
        return Handshake(Trouble.OTHER, error.strerror or str(error))
    # A TLS server sends an alert (21), or an error in plain HTTP/1 as Go's does, or just closes the connection.
    if first[:1] == b"\x15" or b"HTTPS server" in first:
        return Handshake(Trouble.WANTS_TLS)
    return Handshake(Trouble.NONE) if first else Handshake(Trouble.OTHER, _CLOSED)


def _first_bytes(connection: socket.socket) -> bytes:
    connection.sendall(_PREFACE)
    return connection.recv(512)


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=identity.ca.decode("ascii", "replace") if identity.ca else None)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if identity.certificate:
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # ssl loads no certificate from memory; only this user can read the folder
            path = Path(folder) / "pem"
            path.touch(0o600)
            path.write_bytes(identity.certificate + b"\n" + (identity.private_key or b""))
            context.load_cert_chain(path)
    return context


def _why(error: OSError | ValueError) -> Trouble:
    if isinstance(error, ssl.SSLCertVerificationError):
        for codes, trouble in (
            (_EXPIRED, Trouble.EXPIRED),
            (_NOT_YET, Trouble.NOT_YET),
            (_OTHER_NAME, Trouble.OTHER_NAME),
            (_UNTRUSTED, Trouble.UNTRUSTED),
        ):
            if error.verify_code in codes:
                return trouble
        return Trouble.UNTRUSTED
    if isinstance(error, TimeoutError):
        return Trouble.SILENT
    reason = str(getattr(error, "reason", "") or "")
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE", "ACCESS")):
        return Trouble.REFUSES_US
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST"):
        return Trouble.NO_TLS
    return Trouble.OTHER


def _shown(host: str, port: int, identity: Identity, timeout: float) -> Certificate | None:
    try:
        context = _context(Identity(None, identity.certificate, identity.private_key))
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with socket.create_connection((host, port), timeout) as plain, context.wrap_socket(plain) as secure:
            return _read(secure.getpeercert(binary_form=True))
    except (OSError, ValueError):
        return None


def _read(raw: bytes | None) -> Certificate | None:
    with contextlib.suppress(ValueError):
        return certificates.from_der(raw) if raw else None
    return None
