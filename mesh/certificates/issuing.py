"""Authorities and the certificates that they sign. Keys are elliptic-curve keys, and one certificate serves both
servers and clients.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, types
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.identity.credentials import NAME

DAY = datetime.timedelta(days=1)
AUTHORITY_LIFE = 3650 * DAY

SKEW = datetime.timedelta(hours=1)
"""Time from the beginning of a certificate's validity to its creation: a margin for clocks that differ."""

_PEM = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Wanted:
    """The properties that a certificate should have."""

    names: tuple[str, ...]  # DNS names, the mesh's own first
    life: datetime.timedelta
    renew_before: datetime.timedelta  # renewal is due when less is left

    @classmethod
    def of(cls, names: Sequence[str], *, days: int, renew_before: int) -> "Wanted":
        """Describes a certificate for the mesh's own name and `names`, without duplicates. It is valid for `days`, and
        is renewed `renew_before` days before its end. Raises ValueError."""
        if not 0 < renew_before < days:
            raise ValueError(
                f"a certificate of {days} days cannot be renewed {renew_before} days before its end: choose 1 to "
                f"{days - 1} days"
            )
        if 2 * days * DAY > AUTHORITY_LIFE:
            raise ValueError(
                f"a certificate of {days} days is too long, because it may last at most half as long as its authority "
                f"({AUTHORITY_LIFE.days} days): choose at most {AUTHORITY_LIFE.days // 2}"
            )
        names = tuple(dict.fromkeys((NAME, *names)))
        for name in names:
            try:
                x509.DNSName(name)
            except ValueError as error:
                raise ValueError(f"{name!r} is not a DNS name: {error}") from error
            if not name or len(name) > 253 or any(sign.isspace() or sign in "/:,$()" for sign in name):
                raise ValueError(f"{name!r} is not a DNS name: write one such as mesh-etcd-0.mesh-etcd")
        return cls(names, days * DAY, renew_before * DAY)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: types.CertificateIssuerPrivateKeyTypes


def authority(now: datetime.datetime) -> Pair:
    """Creates a self-signed authority, which is valid for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Authorities need different names: while both are trusted, OpenSSL finds the issuer by its name.
    name = _name(f"mesh authority {now:%Y-%m-%d} {x509.random_serial_number() & 0xFFFFFF:06x}")
    uses = _uses(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begin(name, name, key.public_key(), now, now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(uses, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate, key)


def leaf(by: Pair, wanted: Wanted, now: datetime.datetime) -> Pair:
    """Creates a certificate for the mesh's processes, signed by the authority `by`. It expires no later than its
    authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = by.certificate.public_key()
    until = min(now + wanted.life, by.certificate.not_valid_after_utc)
    certificate = (
        _begin(_name(NAME), by.certificate.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in wanted.names]), critical=False)
        .add_extension(_uses(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)  # type: ignore[arg-type]
        .sign(by.key, hashes.SHA256())
    )
    return Pair(certificate, key)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Encodes a certificate as PEM."""
    return certificate.public_bytes(_PEM)


def key_pem(key: types.CertificateIssuerPrivateKeyTypes) -> bytes:
    """Encodes a key as PEM."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(until)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _uses(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
