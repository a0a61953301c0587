"""A private certificate authority, made for one test."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOUR = datetime.timedelta(hours=1)


def certificate(
    name: str, *, ends: datetime.timedelta = HOUR, begins: datetime.timedelta = -24 * HOUR
) -> tuple[bytes, bytes]:
    """Returns the authority's certificate, and a server certificate with its key for that address or host, both as PEM.

    `begins` and `ends` are relative to now, and a past end makes an expired certificate. The authority's own
    certificate is always valid.
    """
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def build(
        name: str,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType,
        begins: datetime.timedelta,
        ends: datetime.timedelta,
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(extension, critical=True)
            .sign(authority_key, hashes.SHA256())
        )

    constraints = x509.BasicConstraints(ca=True, path_length=None)
    authority = build("authority of a test", authority_key, constraints, -24 * HOUR, 365 * 24 * HOUR)
    try:
        names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        names = x509.DNSName(name)
    server = build("server", server_key, x509.SubjectAlternativeName([names]), begins, ends)
    key = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    return authority.public_bytes(pem), server.public_bytes(pem) + key
