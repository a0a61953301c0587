"""Reading certificates in PEM or DER, and judging their expiry. All functions are pure."""

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from mesh.cli.doctor.findings import Area, Finding

SOON = datetime.timedelta(days=14)
"""Remaining validity below which the doctor warns: cert-manager or the chart's CronJob should have renewed the
certificate earlier, and the admin still has time to renew it by hand."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The parts of a certificate that the doctor judges or shows."""

    subject: str
    names: tuple[str, ...]  # hosts and addresses that it is for
    begins: datetime.datetime
    ends: datetime.datetime
    authority: bool


def from_der(raw: bytes) -> Certificate:
    """Reads a certificate in DER. Raises ValueError if it cannot be read."""
    return _facts(x509.load_der_x509_certificate(raw))


def from_pem(raw: bytes) -> list[Certificate]:
    """Reads all certificates in a PEM text. Raises ValueError if there is none, or one cannot be read."""
    return [_facts(one) for one in x509.load_pem_x509_certificates(raw)]


def _facts(certificate: x509.Certificate) -> Certificate:
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    names: list[str] = []
    authority = False
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += alternatives.get_values_for_type(x509.DNSName)
        names += [str(address) for address in alternatives.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        pass
    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        pass
    return Certificate(
        subject=str(common[0].value) if common else certificate.subject.rfc4514_string(),
        names=tuple(names),
        begins=certificate.not_valid_before_utc,
        ends=certificate.not_valid_after_utc,
        authority=authority,
    )


def expiry(area: Area, check: str, what: str, certificate: Certificate, now: datetime.datetime, todo: str) -> Finding:
    """Judges how long a certificate is still valid. `what` names the certificate, `todo` says how to renew it."""
    left = certificate.ends - now
    until = f"{what} ({certificate.subject})"
    if certificate.begins > now:
        text = f"{until} is not valid before {certificate.begins:%Y-%m-%d %H:%M} UTC"
        return area.fail(check, text, f"if that time has passed, this machine's clock is wrong; else {todo}")
    if left <= datetime.timedelta(0):
        return area.fail(check, f"{until} expired on {certificate.ends:%Y-%m-%d %H:%M} UTC", todo)
    days = f"{left.days} days" if left.days != 1 else "1 day"
    if left < SOON:
        return area.warn(check, f"{until} expires in {days}, on {certificate.ends:%Y-%m-%d}", todo)
    return area.ok(check, f"{until} is valid for {days}")


def pem(area: Area, check: str, what: str, raw: bytes, now: datetime.datetime, todo: str) -> Finding:
    """Judges the expiry of the certificate in a PEM text that expires first."""
    try:
        found = from_pem(raw)
    except ValueError as error:
        return area.fail(check, f"{what} is not a certificate in PEM ({error})", todo)
    return expiry(area, check, what, min(found, key=lambda one: one.ends), now, todo)
