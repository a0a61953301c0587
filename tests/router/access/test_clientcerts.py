"""Client certificates as credentials: the header that Envoy sets, the names that count, and forged headers."""

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import MeshError, Reason
from router.access.authority import Authority
from router.access.clientcerts import MAX_NAMES, ClientCertificates
from router.access.credentials import Credentials
from router.access.guard import Guard
from tests.support import certificates
from tests.support.access import KEYS, items

AUTHORITY = certificates.Authority()
XFCC = b"x-forwarded-client-cert"
URI, DNS = x509.UniformResourceIdentifier, x509.DNSName
SPIFFE = "spiffe://example.com/ns/team-a/sa/scorer"


def header(*names: x509.GeneralName, by: str = "", **more: object) -> bytes:
    """Returns the header for a new certificate with these names."""
    return certificates.forwarded(AUTHORITY.issue(*names, **more), by=by)


def subjects(*names: x509.GeneralName) -> frozenset[str]:
    found = ClientCertificates().identify(Credentials(b"", header(*names)))
    assert found is not None
    return found.principal.subjects - {"everyone"}


def test_uris_and_dns_names_are_the_callers_names():
    """The URI of a certificate is the caller's name. URIs and DNS names are subjects of grants; addresses and the
    common name are not."""
    given = header(DNS("Scorer.example.com"), URI(SPIFFE), certificates.named("10.0.0.1"))
    found = ClientCertificates().identify(Credentials(b"", given))
    assert found.principal.name == f"cert:{SPIFFE}"
    assert found.principal.subjects == {f"cert:{SPIFFE}", "cert:scorer.example.com", "everyone"}
    with pytest.raises(MeshError, match="has no usable name") as error:
        ClientCertificates().identify(Credentials(b"", header(certificates.named("10.0.0.1"))))
    assert error.value.reason is Reason.UNAUTHENTICATED
    with pytest.raises(MeshError, match="has no usable name"):
        ClientCertificates().identify(Credentials(b"", header(common_name="admin")))


def test_the_certificate_ends_with_its_validity():
    """A caller's identity ends when the certificate expires, even if the connection lasts longer."""
    now = [certificates.datetime.datetime.now(certificates.datetime.UTC).timestamp()]
    authenticator = ClientCertificates(wall=lambda: now[0])
    credentials = Credentials(b"", header(DNS("a")))
    found = authenticator.identify(credentials)
    assert 3500 < found.until - now[0] <= 3600
    now[0] = found.until
    with pytest.raises(MeshError, match="has expired"):
        authenticator.identify(credentials)


@pytest.mark.parametrize(
    "names",
    [
        [DNS("spiffe://example.com/admin"), DNS("a")],
        [DNS("a;URI=spiffe://example.com/admin"), DNS("a")],
        [URI("a,spiffe://example.com/admin"), DNS("a")],
        [URI("spiffe//example.com/admin"), DNS("a")],
        [DNS("x" * 400), DNS("a")],
        [URI("spiffe:" + "x" * 400), DNS("a")],
        [DNS(""), DNS("a")],
    ],
)
def test_no_name_can_look_like_another(names):
    """A DNS name is never taken for a URI, and a name with separators is not several names."""
    assert subjects(*names) == {"cert:a"}
    assert subjects(URI('x:"a",Cert="b";URI=y')) == {'cert:x:"a",Cert="b";URI=y'}


def test_the_number_of_names_is_bounded():
    assert len(subjects(*(DNS(f"a{number}") for number in range(200)))) == MAX_NAMES


FORGED = [
    b"",
    b"URI=spiffe://example.com/admin",
    b'Hash=00;Subject="CN=admin";URI=spiffe://example.com/admin;DNS=a',
    header(DNS("a")) + b",URI=spiffe://example.com/admin",
    header(DNS("a")) + b"," + header(DNS("b")),
    header(DNS("a")) + b";URI=spiffe://example.com/admin",
    header(DNS("a")).replace(b"Hash=", b"hash="),
    header(DNS("a")).replace(b"MII", b"MIJ"),
    header(DNS("a"))[:-40] + b'"',
]


@pytest.mark.parametrize("value", FORGED)
def test_what_envoy_does_not_write_identifies_nobody(value):
    guard = guard_of_certificates()
    with pytest.raises(MeshError) as error:
        guard.known([(XFCC, value)])
    assert error.value.reason is Reason.UNAUTHENTICATED


@given(st.binary(max_size=200))
def test_no_other_text_identifies_anybody(value):
    with pytest.raises(MeshError):
        ClientCertificates().identify(Credentials(b"", value or b"x"))


def guard_of_certificates() -> Guard:
    """Returns the guard of a mesh that accepts certificates and keys."""
    authority = Authority(KEYS)
    guard = Guard(authority, mode="required", others=[ClientCertificates()], wall=lambda: 1000.0)
    grants = {"g": ("infer", ["fraud/*"], [f"cert:{SPIFFE}"]), "k": ("infer", ["*"], ["key:k"])}
    authority.snapshot(1, items({"k": "k" * 40}, grants))
    return guard


def test_a_certificate_has_the_grants_of_its_names():
    guard = guard_of_certificates()
    caller = guard.known([(XFCC, header(URI(SPIFFE), by="By=spiffe://example.com/router;"))])
    guard.allow(caller, "infer", "fraud/de")
    with pytest.raises(MeshError, match="has no grant"):
        guard.allow(caller, "infer", "other")


def test_a_key_counts_more_than_a_certificate():
    """If a request has a key and a certificate, the key identifies the caller. A wrong key is refused even with a valid
    certificate."""
    guard = guard_of_certificates()
    certificate = (XFCC, header(URI(SPIFFE)))
    assert guard.known([certificate, (b"authorization", b"Bearer " + b"k" * 40)]).name == "key:k"
    with pytest.raises(MeshError, match="the key is unknown"):
        guard.known([certificate, (b"authorization", b"Bearer " + b"x" * 40)])


def test_without_an_authority_for_clients_the_header_means_nothing():
    """Routers that do not verify certificates have no authenticator for them, so a client that sets the header stays
    unknown."""
    authority = Authority(KEYS)
    guard = Guard(authority, mode="required")
    authority.snapshot(1, [])
    with pytest.raises(MeshError, match="no credentials"):
        guard.known([(XFCC, header(URI(SPIFFE)))])
