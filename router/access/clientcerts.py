"""Client certificates as credentials: a caller is identified by the names in a certificate that Envoy has verified.

Envoy removes the header `x-forwarded-client-cert` from clients' requests, and sets it to the certificate of the
connection. Envoy sends the whole certificate and not only its names, because it joins several names with characters
that a name may contain. Without Envoy, or without an authority for clients, nothing removes the header from requests,
and no authenticator reads it.

The names of a caller are the URIs and DNS names of the certificate's subject alternative names. The subject's common
name does not count, since authorities do not check it.
"""

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence

from cryptography import x509

from mesh.access.principals import Principal, check_subject
from mesh.statuses import MeshError, Reason
from router.access.credentials import Credentials, Identified

MAX_NAMES = 50
"""Largest number of names of a certificate that count."""

_HEADER = re.compile(rb'(?:By=[^;,"]*;)*Hash=[0-9a-f]{64};Cert="([A-Za-z0-9%._~!$&\'()*+/:@=-]+)"')
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+")
_DNS = re.compile(r"[A-Za-z0-9*_-]+(\.[A-Za-z0-9_-]+)*")  # no colon: no DNS name can look like a URI


class ClientCertificates:
    """The authenticator of client certificates."""

    def __init__(self, *, wall: Callable[[], float] = time.time) -> None:
        """Makes the authenticator. `wall` returns seconds since the epoch."""
        self.changed: Callable[[], None] = lambda: None
        self._wall = wall

    def identify(self, given: Credentials) -> Identified | None:
        """Returns the caller that the certificate names, or None for a request with a token or without a certificate.
        Raises MeshError UNAUTHENTICATED if the certificate cannot be read, has expired, or has no usable name."""
        if given.token or not given.certificate:
            return None
        certificate = _parsed(given.certificate)
        ends = certificate.not_valid_after_utc.timestamp()
        if ends <= self._wall():
            text = (
                "the client certificate has expired since the connection was made: reconnect with a valid certificate"
            )
            raise MeshError(Reason.UNAUTHENTICATED, text)
        names = list(dict.fromkeys(_names(certificate)))[:MAX_NAMES]
        if not names:
            text = "the client certificate has no usable name: it needs a URI or a DNS name as subject alternative name"
            raise MeshError(Reason.UNAUTHENTICATED, text)
        return Identified(Principal(names[0], names[1:]), ends)

    def look(self) -> None:
        """Does nothing, because Envoy follows the certificates of the authorities."""

    async def close(self) -> None:
        """Does nothing."""

    def statistics(self) -> Sequence[Mapping[str, object]]:
        """Returns the document which says that certificates are accepted."""
        return [{"kind": "certificates"}]


def _parsed(header: bytes) -> x509.Certificate:
    found = _HEADER.fullmatch(header)
    try:
        if found is None:
            raise ValueError("it is not a single certificate")
        return x509.load_pem_x509_certificate(urllib.parse.unquote_to_bytes(found[1]))
    except ValueError as error:
        raise MeshError(
            Reason.UNAUTHENTICATED, "the client certificate cannot be read: connect with one valid X.509 certificate"
        ) from error


def _names(certificate: x509.Certificate) -> Iterator[str]:
    """Yields the subjects that a certificate names, URIs first. Leaves out names that no grant can have."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return
    found = [name for name in names.get_values_for_type(x509.UniformResourceIdentifier) if _URI.fullmatch(name)]
    found += [name.lower() for name in names.get_values_for_type(x509.DNSName) if _DNS.fullmatch(name)]
    for name in found:
        try:
            yield check_subject(f"cert:{name}")
        except ValueError:
            continue
