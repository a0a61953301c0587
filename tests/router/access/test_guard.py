"""The guard of all interfaces: who calls, by which credentials, and what the caller may do."""

import asyncio

import pytest

from mesh.access.verbs import Verb
from mesh.schema import auth
from mesh.statuses import MeshError, Reason
from router.access import guard as guards
from router.access.adminkeys import AdminKeys
from router.access.credentials import Unsettled
from router.access.keys import ADMIN_KEY
from tests.support import access
from tests.support.access import KEYS, guard_of

CI, OPS = "mesh_" + "c" * 43, "mesh_" + "o" * 43


class Clock:
    """A wall clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def guard(clock):
    return guard_of(
        "required",
        {"ci": CI, "ops": OPS},
        {"ci": ("infer", ["fraud"], ["key:ci"]), "ops": ("admin", ["*"], ["key:ops"])},
        wall=clock,
    )


def bearer(key):
    return [(b"x-other", b"1"), (b"authorization", b"Bearer " + key.encode())]


def refused(guard, headers):
    with pytest.raises(MeshError) as raised:
        guard.known(headers)
    assert raised.value.reason is Reason.UNAUTHENTICATED
    return raised.value.text


def may(guard, key, verb, name):
    try:
        guard.allow(guard.known(bearer(key)), verb, name)
    except MeshError as error:
        assert error.reason in (Reason.FORBIDDEN, Reason.UNAUTHENTICATED)
        return False
    return True


def test_a_key_is_known_however_its_scheme_is_written(guard):
    for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
        assert guard.known([(b"authorization", scheme + CI.encode())]).name == "key:ci"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", CI.encode())],
        [(b"authorization", b"Basic " + CI.encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer " + CI.encode() + b"x")],
        [(b"authorization", b"Bearer " + CI[:-1].encode())],
        [(b"authorization", b"Bearer " + CI.upper().encode())],
        [(b"authorization", b"Bearer " + CI.encode() + b", Bearer " + CI.encode())],
        [(b"authorization", b"Bearer " + auth.digest_of(CI.encode()).encode())],
        [(b"authorization", b"Bearer " + CI.encode()), (b"authorization", b"Bearer " + OPS.encode())],
        [(b"authorization", b"Bearer " + CI.encode()), (b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer " + b"x" * 100_000)],
        [(b"Authorization", b"Bearer " + CI.encode())],  # names are in lower case wherever headers arrive
        [(b"x-authorization", b"Bearer " + CI.encode())],
        [(b"proxy-authorization", b"Bearer " + CI.encode())],
    ],
)
def test_nothing_but_the_key_is_known(guard, headers):
    refused(guard, headers)
    assert guard.unknown == 1


def test_a_token_that_is_too_long_is_refused_because_of_its_length(guard):
    assert "has 9007 bytes, more than the 8192 that are accepted" in refused(guard, bearer("x" * 9000))
    assert "must have the form" in refused(guard, [(b"authorization", b"Basic " + b"x" * 9000)])


def test_the_same_header_twice_is_one_key(guard):
    assert guard.known(bearer(CI) + bearer(CI)).name == "key:ci"


def test_a_refusal_contains_no_part_of_the_key(guard):
    assert "ccc" not in refused(guard, bearer("mesh_" + "c" * 42))


def test_a_decision_is_cached_and_cleared_on_a_change(guard):
    assert may(guard, CI, Verb.INFER, "fraud")
    assert not may(guard, CI, Verb.INFER, "other")
    assert len(guard._rulings) == 2
    wider = auth.encode_grant(auth.grant_of({"role": "infer", "models": ["other"], "to": ["key:ci"]}))
    guard.authority.delta(2, [(KEYS.auth_grant("wider"), wider)])
    assert not guard._rulings
    assert may(guard, CI, Verb.INFER, "other")
    guard.authority.delta(3, [(KEYS.auth_grant("wider"), None), (KEYS.auth_grant("ci"), None)])
    assert not may(guard, CI, Verb.INFER, "other")
    assert not may(guard, CI, Verb.INFER, "fraud")


def test_a_revoked_key_is_unknown_with_the_next_call(guard):
    assert may(guard, CI, Verb.INFER, "fraud")
    guard.authority.delta(2, [(KEYS.auth_key("ci"), None)])
    refused(guard, bearer(CI))


def test_a_key_missing_from_a_snapshot_is_revoked(guard):
    assert may(guard, OPS, Verb.ADMIN, "*")
    guard.authority.snapshot(2, access.items({"ci": CI}, {}))
    refused(guard, bearer(OPS))
    assert guard.known(bearer(CI)).name == "key:ci"
    assert not may(guard, CI, Verb.INFER, "fraud")  # its grant is gone too


def test_a_key_ends_at_its_time_even_if_it_is_cached(guard, clock):
    guard.authority.delta(2, [(KEYS.auth_key("ci"), access.key_record(CI, expires=1_005_000))])
    assert may(guard, CI, Verb.INFER, "fraud")
    clock.now = 1005.0
    refused(guard, bearer(CI))


def test_both_secrets_of_a_rotated_key_are_the_same_caller(guard):
    record = auth.decode_key(access.key_record(CI))
    fresh = auth.decode_key(access.key_record(OPS + "x"))
    both = auth.encode_key(auth.KeyRecord(record.secrets + fresh.secrets))
    guard.authority.delta(2, [(KEYS.auth_key("ci"), both)])
    assert guard.known(bearer(CI)).name == guard.known(bearer(OPS + "x")).name == "key:ci"


def test_a_record_that_cannot_be_read_gives_nobody_access(guard):
    guard.authority.delta(2, [(KEYS.auth_key("ci"), b"{"), (KEYS.auth_grant("ops"), b'{"role": "admin"}')])
    refused(guard, bearer(CI))
    assert not may(guard, OPS, Verb.ADMIN, "*")


def test_before_the_keys_are_read_callers_are_told_to_wait():
    guard = guards.Guard(access.Authority(KEYS), mode="required")
    with pytest.raises(MeshError) as raised:
        guard.known(bearer(CI))
    assert raised.value.reason is Reason.REGISTRY_AWAY
    refused(guard, [])


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("off", set()),
        ("management", {Verb.READ, Verb.REGISTER, Verb.ADMIN}),
        ("required", {Verb.READ, Verb.REGISTER, Verb.ADMIN, Verb.INFER, Verb.KNOWN}),
    ],
)
def test_the_mode_says_for_which_verbs_a_caller_must_be_known(mode, asked):
    guard = guard_of(mode, {}, {})
    assert {verb for verb in Verb if guard.asks(verb)} == asked


def test_caches_are_bounded(guard, monkeypatch):
    monkeypatch.setattr(guards, "_MAX_RULINGS", 10)
    monkeypatch.setattr(guards, "_MAX_PRINCIPALS", 10)
    for number in range(100):
        may(guard, CI, Verb.INFER, f"m{number}")
        guard.known([(b"authorization", b"Bearer " + b" " * number + CI.encode())])
        assert len(guard._rulings) <= 10
        assert len(guard._principals) <= 10


# -- callers who cannot be identified at once


async def test_a_caller_is_remembered_once_it_is_identified():
    slow = access.SlowTokens()
    guard = guard_of("required", {"ci": CI}, {}, others=[slow])
    with pytest.raises(Unsettled) as raised:
        guard.known(bearer("slow-anna"))
    slow.known.set()
    assert (await raised.value.settle()).name == "user:anna"
    assert guard.known(bearer("slow-anna")).name == "user:anna"
    assert guard.known(bearer(CI)).name == "key:ci"  # other kinds do not wait
    slow.changed()
    with pytest.raises(Unsettled):
        guard.known(bearer("slow-anna"))


async def test_a_caller_who_is_refused_after_the_wait_is_counted():
    slow = access.SlowTokens()
    guard = guard_of("required", {}, {}, others=[slow])
    slow.known.set()
    with pytest.raises(MeshError) as raised:
        await guard.identified(bearer("slow-bad"))
    assert raised.value.reason is Reason.UNAUTHENTICATED
    assert guard.unknown == 1


async def test_a_wait_for_the_caller_ends_at_the_deadline():
    guard = guard_of("required", {}, {}, others=[access.SlowTokens()])
    with pytest.raises(MeshError) as raised:
        await guard.identified(bearer("slow-anna"), asyncio.get_running_loop().time())
    assert raised.value.reason is Reason.DEADLINE


async def test_nobody_but_the_admin_is_known_before_the_grants_are_read():
    slow = access.SlowTokens()
    slow.known.set()
    guard = guards.Guard(access.Authority(KEYS), mode="required", others=[slow])
    with pytest.raises(MeshError) as raised:
        await guard.identified(bearer("slow-anna"))
    assert raised.value.reason is Reason.REGISTRY_AWAY


# -- the admin key


def test_the_admin_key_may_do_everything_before_etcd_is_read(tmp_path):
    file = tmp_path / "admin.key"
    file.write_text("a" * 32 + "\n\n" + "b" * 40 + "\n")
    guard = guards.Guard(access.Authority(KEYS), mode="required", admin=AdminKeys(str(file)))
    for key in ("a" * 32, "b" * 40):
        assert guard.known(bearer(key)) is ADMIN_KEY
        assert may(guard, key, Verb.ADMIN, "*")


def test_a_replaced_file_of_the_admin_key_ends_the_former_key(tmp_path):
    file = tmp_path / "admin.key"
    file.write_text("a" * 32)
    guard = guards.Guard(access.Authority(KEYS), mode="required", admin=AdminKeys(str(file)))
    guard.authority.snapshot(1, [])
    assert guard.known(bearer("a" * 32)) is ADMIN_KEY
    file.unlink()
    guard.look()  # it is missing: a volume may be late
    assert guard.known(bearer("a" * 32)) is ADMIN_KEY
    file.write_text("short")
    guard.look()
    assert guard.known(bearer("a" * 32)) is ADMIN_KEY
    file.write_text("b" * 33)
    guard.look()
    refused(guard, bearer("a" * 32))
    assert guard.known(bearer("b" * 33)) is ADMIN_KEY
    file.write_text("")
    guard.look()
    refused(guard, bearer("b" * 33))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        *((content, "one key in each line") for content in ("short", "a" * 31, "ä" * 40, "a" * 20 + " " + "a" * 20)),
        ("a" * 100_000, "more than 65536 bytes"),
    ],
)
def test_a_bad_admin_key_is_refused_at_the_start(tmp_path, content, why):
    file = tmp_path / "admin.key"
    file.write_text(content)
    with pytest.raises(ValueError, match=why):
        AdminKeys(str(file))


def test_a_missing_file_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        AdminKeys(str(tmp_path / "nothing"))
