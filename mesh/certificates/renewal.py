"""Renewal of certificates: a pure function that computes the new content from the current content and the time.

The four entries are those of a Secret: `ca.crt` has the trusted authorities and `ca.key` their keys, both with the
newest first. `tls.crt` and `tls.key` are the certificate, and its key, that all processes of the mesh present.

An authority is replaced in steps. A process that is one step behind can still reach the others. A new authority is
added early, while the old one keeps signing. The new authority signs only after some days, when all processes can be
expected to trust it. Kubernetes delivers a changed Secret to pods within minutes, but an etcd trusts a new authority
only after its next start. (The chart's member restarts itself; others may not.) The old authority is removed when it
has expired.

Content that this module did not write is never replaced.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import types

from mesh.certificates import issuing
from mesh.certificates.issuing import DAY, SKEW, Pair, Wanted

AUTHORITIES, AUTHORITY_KEYS, CERTIFICATE, KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"
ENTRIES = (AUTHORITIES, AUTHORITY_KEYS, CERTIFICATE, KEY)

_MARK, _PARAMETERS = b"-----BEGIN ", b"EC PARAMETERS"  # OpenSSL writes the parameters before a key, redundantly
_SETTLED = 0.5  # minimum age of a signing authority, as a share of the renewal period


class Foreign(Exception):
    """Content that this module did not write. The text gives the evidence."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """The content after the renewal, and the reason for each change. `changed` is False if nothing was due."""

    content: Mapping[str, bytes]
    why: tuple[str, ...]
    expires: datetime.datetime  # of the certificate
    authority_expires: datetime.datetime  # of the newest authority

    @property
    def changed(self) -> bool:
        """True if the content changed and has to be written."""
        return bool(self.why)


def renew(content: Mapping[str, bytes], wanted: Wanted, now: datetime.datetime) -> Renewal:
    """Renews everything that is due, and returns the new content with the reasons. The given content may be empty.
    Raises Foreign."""
    why: list[str] = []
    found = _authorities(content)
    authorities = [pair for pair in found if pair.certificate.not_valid_after_utc > now]
    if len(authorities) < len(found):
        why.append("an authority that had expired was dropped")
    if not authorities:
        authorities = [issuing.authority(now)]
        why.append("an authority was made")
    elif authorities[0].certificate.not_valid_after_utc - now < wanted.life + wanted.renew_before:
        authorities.insert(0, issuing.authority(now))
        why.append("a new authority was added: the old one will expire")
    leaf = _leaf(content)
    signer = _signer(authorities, wanted, now)
    reason = _due(leaf, signer, authorities, wanted, now)
    if leaf is None or reason:
        leaf = issuing.leaf(signer, wanted, now)
        why.append(f"a certificate was made: {reason}")
    made = {
        AUTHORITIES: b"".join(issuing.certificate_pem(pair.certificate) for pair in authorities),
        AUTHORITY_KEYS: b"".join(issuing.key_pem(pair.key) for pair in authorities),
        CERTIFICATE: issuing.certificate_pem(leaf.certificate),
        KEY: issuing.key_pem(leaf.key),
    }
    return Renewal(
        {**content, **made} if why else content,
        tuple(why),
        leaf.certificate.not_valid_after_utc,
        authorities[0].certificate.not_valid_after_utc,
    )


def _signer(authorities: list[Pair], wanted: Wanted, now: datetime.datetime) -> Pair:
    """Returns the newest authority that is old enough for all processes to trust it, or the oldest authority if none
    is."""
    settled = wanted.renew_before * _SETTLED
    for pair in authorities:
        if now - (pair.certificate.not_valid_before_utc + SKEW) >= settled:
            return pair
    return authorities[-1]


def _due(leaf: Pair | None, signer: Pair, authorities: list[Pair], wanted: Wanted, now: datetime.datetime) -> str:
    """Returns the reason why a new certificate is needed, or "" if the present one can stay."""
    if leaf is None:
        return "there was none"
    certificate = leaf.certificate
    if not any(_signed(certificate, pair.certificate) for pair in authorities):
        return "no trusted authority has signed the old one"
    if not _signed(certificate, signer.certificate):
        return "the new authority signs from now on"
    if missing := set(wanted.names) - _names(certificate):
        return f"the old one did not have the names {', '.join(sorted(missing))}"
    left = certificate.not_valid_after_utc - now
    if left < wanted.renew_before and signer.certificate.not_valid_after_utc > certificate.not_valid_after_utc:
        return "the old one had expired" if left <= 0 * DAY else "the old one will expire"
    return ""


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return set(names.get_values_for_type(x509.DNSName))


# --- reading --------------------------------------------------------------------------------------------------------


def _authorities(content: Mapping[str, bytes]) -> list[Pair]:
    """Returns the authorities, the newest first. Empty content has none. Raises Foreign."""
    filled = [name for name in ENTRIES if content.get(name)]
    others = sorted(name for name in content if name not in ENTRIES)
    if not filled:
        if others:
            raise Foreign(f"it already contains other entries ({', '.join(others)})")
        return []
    for name in (AUTHORITIES, AUTHORITY_KEYS):
        if name not in filled:
            raise Foreign(f"it contains {', '.join(filled)}, but no {name}, so Mesh did not issue its certificate")
    certificates = _certificates(content, AUTHORITIES)
    keys = [_key(content, AUTHORITY_KEYS, text) for text in _parts(content[AUTHORITY_KEYS])]
    pairs = []
    for certificate in certificates:
        for key in keys:
            if key.public_key() == certificate.public_key():
                pairs.append(Pair(certificate, key))
                break
        else:
            raise Foreign(f"{AUTHORITIES} contains an authority whose key is not in {AUTHORITY_KEYS}")
    return sorted(pairs, key=lambda pair: pair.certificate.not_valid_before_utc, reverse=True)


def _leaf(content: Mapping[str, bytes]) -> Pair | None:
    """Returns the certificate and its key, or None if the content has none. Raises Foreign if they do not match."""
    if not content.get(CERTIFICATE) and not content.get(KEY):
        return None
    for name in (CERTIFICATE, KEY):
        if not content.get(name):
            raise Foreign(f"it contains {CERTIFICATE if name == KEY else KEY}, but no {name}")
    certificate = _certificates(content, CERTIFICATE)[0]
    key = _key(content, KEY, content[KEY])
    if key.public_key() != certificate.public_key():
        raise Foreign(f"{KEY} is not the key of {CERTIFICATE}")
    return Pair(certificate, key)


def _certificates(content: Mapping[str, bytes], name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content[name])
    except ValueError as error:
        raise Foreign(f"{name} does not contain valid certificates in PEM") from error


def _key(content: Mapping[str, bytes], name: str, text: bytes) -> types.CertificateIssuerPrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(text, None)  # type: ignore[return-value]  # which is what Mesh writes
    except (ValueError, TypeError) as error:
        what = "a key with a password" if isinstance(error, TypeError) else "no key in PEM"
        raise Foreign(f"{name} holds {what}") from error


def _parts(text: bytes) -> list[bytes]:
    parts = [_MARK + part for part in text.split(_MARK)[1:] if not part.startswith(_PARAMETERS)]
    return parts or [text]
