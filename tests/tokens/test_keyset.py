"""Sets of public keys: which keys are accepted, and for which algorithms."""

import json

import pytest

from mesh.tokens import keyset
from tests.support.tokens import jwks, private_key, public_jwk

RSA, EC = private_key("RS256"), private_key("ES256")


@pytest.mark.parametrize(
    ("name", "algorithms"),
    [
        ("RS256", {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
        ("ES256", {"ES256"}),
        ("ES384", {"ES384"}),
        ("ES512", {"ES512"}),
        ("EdDSA", {"EdDSA"}),
    ],
)
def test_a_key_verifies_what_fits_its_type(name, algorithms):
    (key,) = keyset.parse(jwks(public_jwk(private_key(name), kid="1"))).keys
    assert key.algorithms == algorithms


def test_a_stated_algorithm_is_the_only_one():
    (key,) = keyset.parse(jwks(public_jwk(RSA, kid="1", alg="RS384"))).keys
    assert key.algorithms == {"RS384"}


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "1"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "1", "alg": "RS256"},
        public_jwk(RSA, kid="1", alg="HS256"),
        public_jwk(RSA, kid="1", alg="none"),
        public_jwk(RSA, kid="1", alg="ES256"),
        public_jwk(RSA, kid="1", alg=7),
        public_jwk(EC, kid="1", alg="ES384"),
        public_jwk(EC, kid="1") | {"use": "enc"},
        public_jwk(EC, kid="1", key_ops=["sign"]),
        public_jwk(EC, kid="1") | {"crv": "secp256k1"},
        public_jwk(EC, kid="1") | {"x": "AAAA"},
        public_jwk(EC, kid="1") | {"x": 7},
        public_jwk(RSA, kid="1") | {"n": "AQAB"},
        {"kty": ["RSA"]},
        {},
    ],
    ids=range(15),
)
def test_a_key_that_verifies_no_accepted_signature_is_left_out(key):
    kept = public_jwk(EC, kid="kept")
    assert [one.id for one in keyset.parse(jwks(key, kept)).keys] == ["kept"]
    with pytest.raises(ValueError, match="none of its 1 keys can verify"):
        keyset.parse(jwks(key))


def test_only_the_public_part_of_a_private_key_is_kept():
    import jwt

    private = jwt.algorithms.ECAlgorithm.to_jwk(EC, as_dict=True) | {"kid": "1"}
    (key,) = keyset.parse(jwks(private)).keys
    assert not hasattr(key.public, "private_numbers")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[]", "not a JWKS"),
        (b'{"keys": {}}', "not a JWKS"),
        (b'{"keys": []}', "none of its 0 keys"),
        (b'{"keys": [' + b"{}," * 100 + b"{}]}", "more than 100 keys"),
        (b" " * (keyset.MAX_BYTES + 1), "larger than"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_set_is_refused(raw, why):
    with pytest.raises(ValueError, match=why):
        keyset.parse(raw)


def test_sets_are_equal_whatever_the_order_of_their_keys():
    one, other = public_jwk(EC, kid="1"), public_jwk(RSA, kid="2")
    turned = json.loads(json.dumps(dict(reversed(one.items()))))
    assert keyset.parse(jwks(one, other)) == keyset.parse(jwks(other, turned))
    assert keyset.parse(jwks(one, other)) != keyset.parse(jwks(one))
