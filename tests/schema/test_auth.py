"""Records of keys and grants, and their changes in a real etcd."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.access.grants import grant
from mesh.schema import auth
from mesh.schema.auth import KeyRecord, KeySecret
from mesh.schema.authstore import AuthStore
from mesh.statuses import MeshError, Reason

INFER = grant("infer", ["fraud/*"], ["key:ci"])
SECRET = b'{"sha256": "' + b"a" * 64 + b'", "created": 1}'


@given(
    st.lists(
        st.builds(KeySecret, st.binary(min_size=32, max_size=32).map(bytes.hex), st.integers(0), st.integers(0, 2**62)),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), unique=True, max_size=3),
)
def test_a_keys_record_comes_back(secrets, groups):
    secrets = [KeySecret(one.digest, one.created % 2**62, one.expires) for one in secrets]
    record = KeyRecord(tuple(secrets), tuple(groups))
    assert auth.decode_key(auth.encode_key(record)) == record


def test_a_grant_comes_back():
    assert auth.decode_grant(auth.encode_grant(INFER)) == INFER


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"{}",
        b'{"secrets": 7}',
        b'{"secrets": [{}]}',
        b'{"secrets": [{"sha256": "ab", "created": 1}]}',
        b'{"secrets": [{"sha256": "' + b"a" * 64 + b'", "created": 1, "expires": -1}]}',
        b'{"secrets": [{"sha256": "' + b"a" * 64 + b'", "created": 1, "networks": []}]}',
        b'{"secrets": []}',
        b'{"secrets": [' + SECRET + b'], "groups": "a"}',
        b'{"secrets": [' + SECRET + b'], "groups": ["a\\nb"]}',
        b'{"secrets": [' + SECRET + b'], "only-from": "10.0.0.0/8"}',
    ],
)
def test_a_record_that_is_not_fully_understood_is_refused(value):
    """A record that is invalid or has an unknown attribute is refused, because a newer version may have put a
    restriction there."""
    with pytest.raises(ValueError):
        auth.decode_key(value)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"role": "infer", "models": ["*"], "to": ["key:a"], "until": 7},
        {"role": "root", "models": ["*"], "to": ["key:a"]},
        {"role": "infer", "models": "*", "to": ["key:a"]},
        {"role": "infer", "models": ["*"], "to": {"key:a": 1}},
        {"role": ["infer"], "models": ["*"], "to": ["key:a"]},
    ],
)
def test_a_grant_that_is_not_fully_understood_is_refused(document):
    with pytest.raises(ValueError):
        auth.decode_grant(json.dumps(document).encode())


def test_keys_differ_and_only_their_digests_are_stored():
    one, other = auth.fresh(), auth.fresh()
    assert one != other
    assert one.startswith("mesh_")
    assert len(one) == 48
    assert auth.digest_of(one.encode()) == hashlib.sha256(one.encode()).hexdigest()


# -- in etcd


@pytest.fixture
def store(etcd, keys):
    return AuthStore(etcd, keys)


async def test_a_key_is_created_once_and_etcd_never_holds_it(store, etcd, keys):
    made = await store.create("ci", now=1000, expires=2000, groups=("team-a",), given=INFER)
    assert (made.name, made.expires) == ("ci", 2000)
    found = await store.keys()
    assert found == {"ci": KeyRecord((KeySecret(auth.digest_of(made.key.encode()), 1000, 2000),), ("team-a",))}
    assert await store.grants() == {"ci": INFER}
    async for kv in etcd.scan(keys.auth):
        assert made.key.encode() not in kv.value
    with pytest.raises(MeshError) as raised:
        await store.create("ci", now=1000)
    assert raised.value.reason is Reason.CONFLICT
    assert "mesh keys rotate ci" in raised.value.text


async def test_a_rotation_keeps_two_secrets_for_a_while(store):
    first = await store.create("ci", now=0)
    second = await store.rotate("ci", now=1000, overlap=500)
    assert second.former_until == 1500
    digests = [auth.digest_of(made.key.encode()) for made in (first, second)]
    assert [(one.digest, one.expires) for one in (await store.keys())["ci"].secrets] == [
        (digests[0], 1500),
        (digests[1], 0),
    ]
    with pytest.raises(MeshError, match="--overlap 0") as raised:
        await store.rotate("ci", now=1200, overlap=500)
    assert raised.value.reason is Reason.PRECONDITION
    third = await store.rotate("ci", now=1600, overlap=500)  # the first secret has expired
    assert [one.expires for one in (await store.keys())["ci"].secrets] == [2100, 0]
    fourth = await store.rotate("ci", now=1700, overlap=0)
    assert fourth.former_until == 0
    assert len({first.key, second.key, third.key, fourth.key}) == 4
    assert [one.digest for one in (await store.keys())["ci"].secrets] == [auth.digest_of(fourth.key.encode())]


async def test_an_expiring_secret_does_not_live_longer_by_a_rotation(store):
    await store.create("ci", now=0, expires=1100)
    made = await store.rotate("ci", now=1000, overlap=500)
    assert made.former_until == 1100


async def test_a_rotated_key_is_valid_for_as_long_as_before(store):
    """A rotation keeps the lifetime of a key, unless the rotation names another one."""
    await store.create("ci", now=1000, expires=91_000)
    made = await store.rotate("ci", now=50_000, overlap=500)
    assert made.expires == (await store.keys())["ci"].secrets[-1].expires == 140_000
    assert (await store.rotate("ci", now=60_000, overlap=0, expires=70_000)).expires == 70_000


async def test_a_revoked_key_takes_no_grant_of_others_with_it(store):
    """A grant that has the key's name is deleted only if it is for that key alone."""
    shared = grant("read", ["fraud/*"], ["group:team", "key:ci"])
    await store.create("ci", now=0)
    await store.put("ci", shared)
    assert await store.revoke("ci")
    assert await store.grants() == {"ci": shared}


async def test_a_revoked_key_leaves_nothing(store, etcd, keys):
    await store.create("ci", now=0, given=INFER)
    assert await store.revoke("ci")
    assert not await store.revoke("ci")
    assert [kv async for kv in etcd.scan(keys.auth)] == []
    with pytest.raises(MeshError) as raised:
        await store.rotate("ci", now=0, overlap=0)
    assert raised.value.reason is Reason.UNKNOWN_MODEL


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 64, "-a", "ä", "a\n"])
async def test_bad_names_are_refused(store, name):
    for work in (store.create(name, now=0), store.rotate(name, now=0, overlap=0), store.revoke(name)):
        with pytest.raises(MeshError) as raised:
            await work
        assert raised.value.reason is Reason.BAD_REQUEST


async def test_apply_makes_the_grants_those_of_the_file(store, etcd, keys):
    """Applying a set of grants writes what differs, removes what is missing, and leaves the grants of keys alone."""
    await store.create("ci", now=0, given=INFER)
    await store.put("old", INFER)
    await store.put("same", INFER)
    await etcd.put(keys.auth_grant("broken"), b"{}")
    other = grant("read", ["*"], ["group:b"])
    many = {f"g{number}": other for number in range(120)}
    written, removed = await store.apply({"same": INFER, "new": other, **many})
    assert set(written) == {"new", *many}
    assert set(removed) == {"old", "broken"}
    assert await store.grants() == {"ci": INFER, "same": INFER, "new": other, **many}
    assert await store.apply({"same": INFER, "new": other, **many}) == ([], [])
