"""Credentials read from a folder with ca.crt, tls.crt and tls.key, and tested by a handshake with themselves.

The handshake in memory finds every fault that two processes with these files would have: a key of another certificate,
an authority that did not sign it, or a certificate that is for servers only, for another name, or not valid now. It
also yields the expiry date, for which Python's `ssl` has no function.

Peers are recognised by a name that every certificate of the mesh has, because the addresses of pods change.
"""

import contextlib
import datetime
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

NAME = "mesh.internal"
"""The DNS name that each end of a connection requires in the other's certificate."""

FILES = ("ca.crt", "tls.crt", "tls.key")

_READINGS = 5  # attempts, if files change meanwhile
_FLIGHTS = 10  # maximum number of turns in a handshake; TLS 1.3 takes two

Stamp = tuple[tuple[int, int, int], ...]
"""Device, inode and time of each file. At least one of these differs once a file is replaced."""


class IdentityError(ValueError):
    """Files that cannot be used. The text names the file, and says why it cannot be used and what to do."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The contents of files that were tested together, and the TLS contexts made from them."""

    ca: bytes = field(repr=False)  # PEM, one or several authorities
    certificate: bytes = field(repr=False)  # PEM
    private_key: bytes = field(repr=False)  # PEM
    accepting: ssl.SSLContext
    connecting: ssl.SSLContext
    expires: float  # seconds since the epoch


def stamp(folder: Path) -> Stamp:
    """Returns the state of the files (inode and time of change) without reading them. Raises IdentityError."""
    found = []
    for name in FILES:
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        found.append((status.st_dev, status.st_ino, status.st_mtime_ns))
    return tuple(found)


def read(folder: Path) -> tuple[Credentials, Stamp]:
    """Returns the credentials in the files, and the state of the files at that time. Raises IdentityError."""
    for _ in range(_READINGS):
        before = stamp(folder)
        parts = [_content(folder / name) for name in FILES]
        if stamp(folder) == before:
            return made(folder, *parts), before
    raise IdentityError(
        f"the files in {folder} (--internal-tls) keep changing while they are read: try again once they are complete"
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> IdentityError:
    return IdentityError(
        f"{path} cannot be read: {error.strerror}. --internal-tls needs a folder with {', '.join(FILES)}; "
        "`mesh certificates` creates them"
    )


def context(folder: Path, side: int, ca: bytes, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    """Makes the TLS context for `side`, ssl.PROTOCOL_TLS_SERVER or ssl.PROTOCOL_TLS_CLIENT. Raises IdentityError."""
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are Mesh's
    if side == ssl.PROTOCOL_TLS_SERVER:
        made.num_tickets = 0  # a resumed session would not show its certificate again
    try:
        made.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise IdentityError(
            f"{folder}/ca.crt contains no certificate authority in PEM: {reason(error)}. `mesh certificates` creates "
            "one"
        ) from error
    try:
        load_chain(made, certificate + b"\n" + private_key)
    except (ssl.SSLError, ValueError) as error:
        raise IdentityError(
            f"{folder}/tls.crt does not work with {folder}/tls.key: {reason(error)}. Both must be PEM, the key without "
            "a password"
        ) from error
    return made


def made(folder: Path, ca: bytes, certificate: bytes, private_key: bytes) -> Credentials:
    """Makes credentials from the contents of files, and tests them. Raises IdentityError, which names the files in
    `folder`."""
    accepting = context(folder, ssl.PROTOCOL_TLS_SERVER, ca, certificate, private_key)
    connecting = context(folder, ssl.PROTOCOL_TLS_CLIENT, ca, certificate, private_key)
    try:
        shown = _handshake(accepting, connecting)
    except ssl.SSLError as error:
        if (ended := _expired(ca, certificate)) is not None:
            raise IdentityError(
                f"{folder}/{ended}. Replace it; on Kubernetes, update its Secret (internalTLS.existingSecret). "
                "`mesh certificates` makes and renews such files"
            ) from error
        raise IdentityError(
            f"{folder}/tls.crt does not work for the mesh: {reason(error)}. It has to be signed by an authority "
            f"in ca.crt, for the name {NAME}, for servers and clients, and valid now; `mesh certificates` creates one"
        ) from error
    return Credentials(
        ca, certificate, private_key, accepting, connecting, expires=ssl.cert_time_to_seconds(str(shown["notAfter"]))
    )


def accepts(former: Credentials, new: Credentials) -> bool:
    """Returns whether a process that still has the former credentials accepts the new certificate."""
    showing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_chain(showing, new.certificate + b"\n" + new.private_key)
    try:
        _handshake(showing, former.connecting)
    except ssl.SSLError:
        return False
    return True


def _expired(ca: bytes, certificate: bytes) -> str | None:
    """Returns a text that says which certificate has expired, and when, or None if none has expired. Called only after
    a failure."""
    for name, pem, some in (("tls.crt", certificate, 1), ("ca.crt", ca, None)):
        with contextlib.suppress(ValueError):
            if ended := expired(pem, some):
                return f"{name} {ended}"
    return None


def expired(pem: bytes, some: int | None = 1) -> str:
    """Returns "has expired on ..." if each of the first `some` certificates (None: all) has expired, or else "". Raises
    ValueError for invalid PEM."""
    from cryptography import x509  # imported here: it takes megabytes that a process with valid files does not need

    ends = max(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(pem)[:some])
    return f"has expired on {ends:%Y-%m-%d %H:%M} UTC" if ends <= datetime.datetime.now(datetime.UTC) else ""


def load_chain(context: ssl.SSLContext, chain: bytes) -> None:
    """Loads a certificate and its key, in PEM, into a context. Raises ssl.SSLError, ValueError.

    `load_cert_chain` accepts only paths, and the files at these paths may just have been replaced."""
    memory = os.memfd_create("chain", os.MFD_CLOEXEC)
    try:
        os.write(memory, chain)
        # Without the empty password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(f"/proc/self/fd/{memory}", password="")
    finally:
        os.close(memory)


def _handshake(accepting: ssl.SSLContext, connecting: ssl.SSLContext) -> dict[str, object]:
    """Returns the accepting end's certificate, as the connecting end sees it. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = connecting.wrap_bio(back, there, server_hostname=NAME)
    waiting = [client, accepting.wrap_bio(there, back, server_side=True)]
    for _ in range(_FLIGHTS):
        for end in tuple(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            break
    else:
        raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the handshake does not end")
    return dict(client.getpeercert() or {})


def reason(error: Exception) -> str:
    """Returns OpenSSL's reason in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
