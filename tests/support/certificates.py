"""Private certificate authorities, each made for one test."""

import datetime
import ipaddress
import urllib.parse

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOUR = datetime.timedelta(hours=1)

_PEM = serialization.Encoding.PEM


class Authority:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        made = self._build("authority of a test", self._key, constraints, -24 * HOUR, 365 * 24 * HOUR)
        self.pem = made.public_bytes(_PEM)

    def issue(
        self,
        *names: x509.GeneralName,
        ends: datetime.timedelta = HOUR,
        begins: datetime.timedelta = -24 * HOUR,
        common_name: str = "server",
    ) -> bytes:
        """Returns a certificate for these alternative names, followed by its key. `begins` and `ends` are relative to
        now, and a past end makes an expired certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        extension = x509.SubjectAlternativeName(names) if names else None
        made = self._build(common_name, key, extension, begins, ends)
        private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return made.public_bytes(_PEM) + private

    def _build(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType | None,
        begins: datetime.timedelta,
        ends: datetime.timedelta,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
        )
        if extension is not None:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(self._key, hashes.SHA256())


def named(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def certificate(
    name: str, *, ends: datetime.timedelta = HOUR, begins: datetime.timedelta = -24 * HOUR
) -> tuple[bytes, bytes]:
    """Returns, as PEM, the certificate of a new authority, and a certificate for the address or host `name` with its
    key. `begins` and `ends` are relative to now and apply only to the second; the authority is always valid."""
    authority = Authority()
    return authority.pem, authority.issue(named(name), begins=begins, ends=ends)


def forwarded(pem: bytes, *, by: str = "") -> bytes:
    """Returns the header `x-forwarded-client-cert` as Envoy writes it for a client's certificate. `by` is its part
    about the server's own certificate."""
    text = pem.decode().partition("-----BEGIN PRIVATE KEY-----")[0]
    return f'{by}Hash={"0a" * 32};Cert="{urllib.parse.quote(text, safe="")}"'.encode()
