"""The verification of tokens: signatures, algorithms, claims and clocks."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from mesh.tokens import identities, keyset, verification
from mesh.tokens.settings import ALGORITHMS
from mesh.tokens.verification import Rules, TokenError, UnknownKeyError
from tests.support.tokens import AUDIENCE, ISSUER, FakeIssuer, b64, by_hand, by_hmac, jwks, private_key, public_jwk

NOW = 1_800_000_000.0
ANNA = FakeIssuer()
KEYS = keyset.parse(ANNA.jwks)
RULES = Rules(ISSUER, (AUDIENCE, "mesh-too"), skew=60)


def verified(token, *, keys=KEYS, algorithms=ALGORITHMS, rules=RULES, now=NOW, ahead=None):
    """Verifies the token. Returns its claims, and the time until which they are valid."""
    raw = token if isinstance(token, bytes) else token.encode()
    claims = verification.verify(raw, verification.read(raw), keys, algorithms)
    return claims, verification.check(claims, rules, now=now, ahead=ahead)


def refused(token, **more):
    with pytest.raises(TokenError) as raised:
        verified(token, **more)
    return str(raised.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_accepted_algorithm_is_verified(algorithm):
    key = private_key("RS256" if algorithm[0] in "RP" else algorithm)
    keys = keyset.parse(jwks(public_jwk(key, kid="1")))
    token = jwt.encode(ANNA.claims(now=NOW), key, algorithm, headers={"kid": "1"})
    claims, until = verified(token, keys=keys)
    assert (claims["sub"], until) == ("anna", NOW + 3660)
    wrong = [name for name in ALGORITHMS if name != algorithm]
    assert "not accepted" in refused(token, keys=keys, algorithms=wrong)
    for cut in (1, 10, 40):
        assert "wrong" in refused(token[: -cut - 4] + "AAAA" + token[len(token) - cut :], keys=keys)


def test_an_unsigned_token_is_refused():
    for name in ("none", "None", "NONE", "", "nOnE"):
        assert "not accepted" in refused(by_hand({"alg": name, "kid": ANNA.current}, ANNA.claims(now=NOW)))


@pytest.mark.parametrize("form", ["PEM", "DER", "jwk"])
def test_a_public_key_is_no_secret_for_hmac(form):
    """A token that is signed by HMAC with the public key, which everybody knows, is refused. This is the attack on
    verifiers that let the token choose the algorithm."""
    public = ANNA.keys[ANNA.current].public_key()
    if form == "jwk":
        secret = json.dumps(public_jwk(ANNA.keys[ANNA.current])).encode()
    else:
        encoding = getattr(serialization.Encoding, form)
        secret = public.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    for digest in ("sha256", "sha384", "sha512"):
        token = by_hmac({"kid": ANNA.current}, ANNA.claims(now=NOW), secret, digest)
        assert f"'HS{digest[3:]}', which is not accepted" in refused(token)


def test_the_algorithm_must_fit_the_key():
    rsa = private_key("RS256")
    token = jwt.encode(ANNA.claims(now=NOW), rsa, "RS256", headers={"kid": ANNA.current})
    assert "does not sign by RS256" in refused(token)


def test_a_key_in_the_header_is_ignored():
    """A token that contains its own key (`jwk`, `jku`, `x5u`) is verified with the issuer's key."""
    own = private_key("ES256")
    headers = {"kid": ANNA.current, "jwk": public_jwk(own), "jku": "http://127.0.0.1/keys", "x5u": "http://127.0.0.1/"}
    assert "signature is wrong" in refused(jwt.encode(ANNA.claims(now=NOW), own, "ES256", headers=headers))


def test_an_unknown_critical_header_is_refused():
    token = ANNA.token(now=NOW, headers={"kid": ANNA.current, "crit": ["b64"], "b64": False})
    assert refused(token)
    token = ANNA.token(now=NOW, headers={"kid": ANNA.current, "crit": ["exp2"], "exp2": 1})
    assert refused(token)


def test_a_token_without_a_key_id_is_tried_with_the_few_keys_of_its_algorithm():
    other = FakeIssuer()
    keys = keyset.parse(jwks(public_jwk(private_key("RS256"), kid="r"), *json.loads(other.jwks)["keys"]))
    assert verified(other.token(now=NOW, headers={}), keys=keys)[0]["sub"] == "anna"
    with pytest.raises(UnknownKeyError):
        verified(ANNA.token(now=NOW, headers={}), keys=keys)


def test_an_unknown_key_is_told_apart_from_a_wrong_signature():
    other = FakeIssuer()
    with pytest.raises(UnknownKeyError, match="has no key 'other'"):
        verified(other.token(now=NOW, headers={"kid": "other"}))
    with pytest.raises(TokenError, match="signature is wrong") as raised:
        verified(other.token(now=NOW, headers={"kid": ANNA.current}))
    assert not isinstance(raised.value, UnknownKeyError)


# -- claims


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"iss": "https://other.example"}, "of another issuer, 'https://other.example'"),
        ({"iss": f"{ISSUER}/"}, "of another issuer"),
        ({"iss": None}, "does not name its issuer"),
        ({"iss": [ISSUER]}, "does not name its issuer"),
        ({"aud": "other"}, "is for 'other', not for this mesh: request one for the audience mesh"),
        ({"aud": ["a", "b", "c", "d"]}, "is for 'a', 'b', 'c', not"),
        ({"aud": None}, "is for nobody"),
        ({"aud": {"mesh": 1}}, "is for nobody"),
        ({"aud": "MESH"}, "is for 'MESH'"),
        ({"exp": None}, "never expires"),
        ({"exp": "2030"}, "`exp` is not a time"),
        ({"exp": True}, "`exp` is not a time"),
        ({"nbf": []}, "`nbf` is not a time"),
        ({"exp": int(NOW - 61)}, "expired 61 s ago, by this router's clock"),
        ({"exp": int(NOW - 7200)}, "expired 120 min ago"),
        ({"nbf": int(NOW + 61)}, "61 s in the future, by this router's clock"),
    ],
)
def test_claims_that_do_not_fit_are_refused_with_the_reason(changed, why):
    assert why in refused(ANNA.token(now=NOW, **changed))


@pytest.mark.parametrize(
    "changed", [{"aud": ["x", "mesh-too"]}, {"exp": int(NOW - 59)}, {"nbf": int(NOW + 59)}, {"iat": None}]
)
def test_claims_that_fit_within_the_skew_are_accepted(changed):
    assert verified(ANNA.token(now=NOW, **changed))[0]["sub"] == "anna"


@pytest.mark.parametrize("ahead", [None, 0.4, 300.0])
def test_a_clock_that_is_five_minutes_ahead_is_named(ahead):
    """If this machine's clock is ahead, a fresh token with a short life looks expired. If the issuer's clock is known
    to differ, the error names the difference."""
    text = refused(ANNA.token(now=NOW, lifetime=200), now=NOW + 300, ahead=ahead)
    assert "expired 100 s ago, by this router's clock" in text
    assert ("which is 300 s ahead of the issuer's: set both right" in text) is (ahead == 300.0)


@pytest.mark.parametrize("ahead", [None, -300.0])
def test_a_clock_that_is_five_minutes_behind_is_named(ahead):
    text = refused(ANNA.token(now=NOW), now=NOW - 300, ahead=ahead)
    assert "issued 300 s in the future, by this router's clock" in text
    if ahead is None:
        assert "clocks differ by more than the 60 s that are allowed: set both right" in text
    else:
        assert "which is 300 s behind the issuer's: set both right" in text


# -- garbage


@given(st.binary(max_size=200), st.sampled_from([b"ey.%s.", b"%s.e30.x", b"eyJhbGciOiJFUzI1NiJ9.%s.AAAA", b"%s"]))
def test_no_garbage_is_accepted_or_breaks_the_verification(garbage, form):
    token = form % b64(garbage) if b"%s" in form else form
    for one in (token, token.replace(b64(garbage), garbage)):
        if verification.looks_like(one):
            with pytest.raises(TokenError):
                verified(one)


SIGNED = ANNA.token(now=NOW).encode()


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 127))
def test_no_changed_byte_is_accepted(at, by):
    token = SIGNED[:at] + bytes([SIGNED[at] ^ by]) + SIGNED[at + 1 :]
    if verification.looks_like(token):
        with pytest.raises(TokenError):
            verified(token)


@pytest.mark.parametrize("depth", [1000, 5000])
def test_deep_claims_are_refused(depth):
    head = b64(b'{"alg":"ES256"}')
    for part in (b"[" * depth, b'{"a":' * depth):
        with pytest.raises(TokenError, match="not a JWT"):
            verification.read(head + b"." + b64(part) + b".AAAA")


# -- identities


@pytest.mark.parametrize(
    ("claims", "name", "groups", "user", "subjects"),
    [
        ({"sub": "anna"}, "sub", "groups", "user:anna", set()),
        ({"sub": "a", "groups": ["x", "y"]}, "sub", "groups", "user:a", {"group:x", "group:y"}),
        ({"sub": "a", "groups": "x"}, "sub", "groups", "user:a", {"group:x"}),
        ({"sub": "a", "r": {"roles": ["x"]}}, "sub", "r.roles", "user:a", {"group:x"}),
        ({"sub": "a", "https://e.org/g": ["x"]}, "sub", "https://e.org/g", "user:a", {"group:x"}),
        ({"sub": "a", "groups": [7, None, "", "x\n", "x" * 400, "ok"]}, "sub", "groups", "user:a", {"group:ok"}),
        ({"sub": "a", "groups": ["system:serviceaccounts", "system:masters"]}, "sub", "groups", "user:a", set()),
        ({"sub": "a", "groups": {"x": 1}}, "sub", "groups", "user:a", set()),
        ({"email": "a@b.c", "email_verified": True}, "email", "groups", "user:a@b.c", set()),
    ],
)
def test_the_user_and_the_groups_of_claims(claims, name, groups, user, subjects):
    found = identities.user(claims, name=name, groups=groups)
    assert found.name == user
    assert found.subjects == {user, "everyone", *subjects}


@pytest.mark.parametrize(
    ("claims", "name", "why"),
    [
        ({}, "sub", "no usable name"),
        ({"sub": ""}, "sub", "no usable name"),
        ({"sub": 7}, "sub", "no usable name"),
        ({"sub": "a\nb"}, "sub", "no usable name"),
        ({"sub": "x" * 400}, "sub", "no usable name"),
        ({"sub": "system:serviceaccount:a:b"}, "sub", "no usable name"),
        ({"email": "a@b.c", "email_verified": False}, "email", "not verified"),
        ({"email": "a@b.c", "email_verified": "true"}, "email", "not verified"),
        ({"sub": "a", "groups": ["g"] * 501}, "sub", "more than 500 groups"),
    ],
)
def test_claims_without_a_usable_identity_are_refused(claims, name, why):
    with pytest.raises(TokenError, match=why):
        identities.user(claims, name=name)


def test_a_service_account_has_its_groups():
    found = identities.account("system:serviceaccount:team-a:ci")
    assert found.name == "serviceaccount:team-a:ci"
    groups = {"group:system:serviceaccounts", "group:system:serviceaccounts:team-a"}
    assert found.subjects == {"serviceaccount:team-a:ci", "everyone", *groups}
    assert "group:x" in identities.account("system:serviceaccount:team-a:ci", ["x", "\n"]).subjects


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "anna",
        "system:node:x",
        "system:serviceaccount:a",
        "system:serviceaccount:a:b:c",
        "system:serviceaccount:A:b",
    ],
)
def test_what_is_no_service_account_is_refused(name):
    assert not identities.is_account(name)
    with pytest.raises(TokenError):
        identities.account(name)
