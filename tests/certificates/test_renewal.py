"""The renewal of certificates and authorities, tested without files, network or a real clock."""

import datetime
import ssl

import pytest
from cryptography import x509

from mesh.certificates import Foreign, Wanted, renew
from mesh.certificates.renewal import AUTHORITIES, AUTHORITY_KEYS, CERTIFICATE, ENTRIES, KEY

DAY = datetime.timedelta(days=1)
START = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
WANTED = Wanted.of(["localhost"], days=365, renew_before=60)


def certificate(content) -> x509.Certificate:
    return x509.load_pem_x509_certificate(content[CERTIFICATE])


def authorities(content) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(content[AUTHORITIES])


def signer(content) -> int:
    """Returns the index of the authority that has signed the certificate; 0 is the newest."""
    leaf = certificate(content)
    (found,) = [number for number, one in enumerate(authorities(content)) if one.subject == leaf.issuer]
    leaf.verify_directly_issued_by(authorities(content)[found])
    return found


@pytest.fixture(scope="module")
def first():
    return renew({}, WANTED, START)


def test_nothing_becomes_all(first):
    """Without any files, all of them are made. The certificate has all names, works for clients and servers, and is
    valid from a moment before now."""
    assert first.changed
    assert set(first.content) == set(ENTRIES)
    leaf = certificate(first.content)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mesh.internal", "localhost"]
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use._name for use in uses} == {"clientAuth", "serverAuth"}
    assert leaf.not_valid_before_utc < START
    assert leaf.not_valid_after_utc == START + 365 * DAY == first.expires
    assert first.authority_expires == START + 3650 * DAY
    assert signer(first.content) == 0
    assert len(first.why) == 2


def test_what_is_not_due_stays(first):
    for days in (0, 1, 304.9):
        again = renew(first.content, WANTED, START + days * DAY)
        assert not again.changed
        assert again.content == first.content


def test_a_certificate_is_renewed_and_its_authority_is_kept(first):
    """A certificate is renewed in the days before its expiry, and also after it. Its authority stays."""
    for days in (305.1, 364, 400):
        later = renew(first.content, WANTED, START + days * DAY)
        assert later.changed
        assert later.content[AUTHORITIES] == first.content[AUTHORITIES]
        assert later.content[AUTHORITY_KEYS] == first.content[AUTHORITY_KEYS]
        assert later.content[CERTIFICATE] != first.content[CERTIFICATE]
        assert later.expires == START + (days + 365) * DAY
        assert not renew(later.content, WANTED, START + days * DAY).changed


def test_a_name_that_is_wanted_is_added_and_one_that_is_not_stays(first):
    more = renew(first.content, Wanted.of(["localhost", "etcd-1"], days=365, renew_before=60), START)
    assert more.changed
    assert "etcd-1" in more.why[0]
    assert not renew(more.content, WANTED, START).changed


@pytest.mark.long
def test_an_authority_is_changed_with_an_overlap():
    """The validity of old and new authorities overlaps. In daily runs over eleven years, processes that have today's
    files and processes whose files are a day or a month old can verify each other."""
    content, history = {}, []
    moments = {"added": [], "signs": [], "dropped": []}
    for days in range(11 * 365):
        now = START + days * DAY
        before = content
        done = renew(content, WANTED, now)
        content = done.content
        history.append(content)
        assert done.expires > now
        trusted = authorities(content)
        if before and len(trusted) > len(authorities(before)):
            moments["added"].append(days)
            assert signer(content) == signer(before) + 1 == 1
        if before and certificate(content).issuer != certificate(before).issuer:
            moments["signs"].append(days)
            assert signer(content) == 0
        if before and len(trusted) < len(authorities(before)):
            moments["dropped"].append(days)
        for back in (1, 29):
            other = history[max(0, len(history) - 1 - back)]
            if days > back:
                assert verifies(authorities(other), certificate(content)), days
                assert verifies(trusted, certificate(other)), days
    assert moments == {"added": [3226], "signs": [3256], "dropped": [3650]}


def verifies(trusted: list[x509.Certificate], leaf: x509.Certificate) -> bool:
    for authority in trusted:
        try:
            leaf.verify_directly_issued_by(authority)
            return True
        except ValueError:
            continue
    return False


def test_a_run_after_years_makes_a_new_authority(first):
    """If no run happened for years and everything has expired, the next run makes a new authority and new
    certificates."""
    late = renew(first.content, WANTED, START + 4000 * DAY)
    assert len(authorities(late.content)) == 1
    assert authorities(late.content)[0].subject != authorities(first.content)[0].subject
    assert signer(late.content) == 0
    assert late.expires == START + 4365 * DAY


def test_no_certificate_outlives_its_authority(first):
    """No certificate outlives its authority, even if runs were missed until shortly before the authority expires. The
    next run changes nothing, because a new certificate would expire at the same time."""
    late = renew(first.content, WANTED, START + 3600 * DAY)
    assert len(authorities(late.content)) == 2
    assert signer(late.content) == 1
    assert late.expires == START + 3650 * DAY
    assert not renew(late.content, WANTED, START + 3601 * DAY).changed
    settled = renew(late.content, WANTED, START + 3630 * DAY)
    assert signer(settled.content) == 0


def test_an_authority_of_ones_own_is_used(first):
    """If an admin provides an authority as ca.crt and ca.key, it is used and the other files are made."""
    own = {name: first.content[name] for name in (AUTHORITIES, AUTHORITY_KEYS)}
    done = renew(own, WANTED, START + DAY)
    assert done.content[AUTHORITIES] == own[AUTHORITIES]
    assert signer(done.content) == 0


def other() -> dict[str, bytes]:
    return dict(renew({}, WANTED, START).content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            lambda content: content.update({AUTHORITIES: b"x"}),
            "ca.crt does not contain valid certificates",
            id="ca.crt",
        ),
        pytest.param(lambda content: content.update({AUTHORITY_KEYS: b"x"}), "ca.key holds no key", id="ca.key"),
        pytest.param(
            lambda content: content.update({CERTIFICATE: b"x"}),
            "tls.crt does not contain valid certificates",
            id="tls.crt",
        ),
        pytest.param(lambda content: content.update({KEY: b"x"}), "tls.key holds no key", id="tls.key"),
        pytest.param(lambda content: content.pop(AUTHORITY_KEYS), "no ca.key", id="of-somebody-else"),
        pytest.param(lambda content: content.pop(KEY), "no tls.key", id="half"),
        pytest.param(lambda content: content.update({KEY: other()[KEY]}), "not the key of tls.crt", id="other-key"),
        pytest.param(
            lambda content: content.update({AUTHORITY_KEYS: other()[AUTHORITY_KEYS]}), "whose key is not", id="other-ca"
        ),
    ],
)
def test_what_is_not_ours_is_not_touched(first, spoil, words):
    content = dict(first.content)
    spoil(content)
    with pytest.raises(Foreign, match=words):
        renew(content, WANTED, START + 400 * DAY)


def test_a_secret_for_something_else_is_not_filled():
    with pytest.raises(Foreign, match=r"already contains other entries \(etcd_connection, password\)"):
        renew({"password": b"x", "etcd_connection": b"{}"}, WANTED, START)


def test_further_entries_stay(first):
    done = renew({**first.content, "note": b"mine"}, WANTED, START + 350 * DAY)
    assert done.changed
    assert done.content["note"] == b"mine"


def test_empty_entries_are_none():
    assert renew(dict.fromkeys(ENTRIES, b""), WANTED, START).changed


@pytest.mark.parametrize(
    ("names", "days", "before"),
    [
        (["a b"], 365, 60),
        (["https://x"], 365, 60),
        (["mesh-etcd-0.mesh-etcd.$(POD_NAMESPACE).svc"], 365, 60),
        (["bücher.example"], 365, 60),
        ([""], 365, 60),
        ([], 60, 60),
        ([], 60, 0),
        ([], 2000, 60),
    ],
)
def test_what_cannot_be_is_said(names, days, before):
    with pytest.raises(ValueError, match=r"is not a DNS name|cannot be renewed|is too long"):
        Wanted.of(names, days=days, renew_before=before)


def test_pythons_own_tls_takes_them(tmp_path):
    """Python's TLS accepts the files even with the strict checks that most versions leave off."""
    now = datetime.datetime.now(datetime.UTC)
    content = renew({}, WANTED, now).content
    (tmp_path / "tls.pem").write_bytes(content[CERTIFICATE] + content[KEY])
    client = ssl.create_default_context(cadata=content[AUTHORITIES].decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(tmp_path / "tls.pem")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname="mesh.internal"),
        server.wrap_bio(there, back, server_side=True),
    ]
    done = set()
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    assert done == set(ends)
