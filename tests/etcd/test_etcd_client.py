"""Reads, writes and transactions in a real etcd."""

import asyncio
from typing import Any

import pytest

from mesh.etcd import (
    MAX_OPERATIONS,
    Etcd,
    EtcdClosed,
    EtcdCompacted,
    EtcdError,
    EtcdLeaseLost,
    EtcdUnavailable,
    KeyValue,
    absent,
    absent_prefix,
    absent_range,
    created,
    created_in_range,
    delete_op,
    delete_range_op,
    exists,
    get_op,
    get_range_op,
    leased,
    modified,
    put_op,
    value_is,
)
from mesh.etcd.endpoints import parse_endpoint
from mesh.etcd.ranges import after_prefix
from mesh.options.etcdsettings import EtcdSettings
from mesh.process import free_port
from mesh.schema.keys import Keys
from mesh.statuses import Reason
from tests.support.etcd import EtcdServer
from tests.support.proxy import Proxy
from tests.support.waiting import until


async def fill(etcd: Etcd, prefix: bytes, count: int, value: bytes = b"v") -> list[bytes]:
    names = [prefix + b"%05d" % number for number in range(count)]
    for start in range(0, count, 100):
        await etcd.txn([], [put_op(name, value) for name in names[start : start + 100]])
    return names


# --- one key ---


async def test_a_key_is_what_was_written_last(etcd: Etcd, keys: Keys) -> None:
    key = keys.model("m")
    assert await etcd.get(key) is None
    first = await etcd.put(key, b"one")
    second = await etcd.put(key, b"two\0\xff")
    assert second > first
    assert await etcd.get(key) == KeyValue(key, b"two\0\xff", first, second, 2, 0)
    assert await etcd.delete(key)
    assert not await etcd.delete(key)
    assert await etcd.get(key) is None


async def test_several_keys_are_read_at_one_revision(etcd: Etcd, keys: Keys) -> None:
    """A key that does not exist is None in the result."""
    first = await etcd.put(keys.model("a"), b"1")
    second = await etcd.put(keys.vmodel("a"), b"2")
    (model, missing, vmodel), revision = await etcd.several([keys.model("a"), keys.model("b"), keys.vmodel("a")])
    assert model is not None
    assert vmodel is not None
    assert (model.value, model.mod_revision) == (b"1", first)
    assert missing is None
    assert (vmodel.value, vmodel.mod_revision) == (b"2", second)
    assert revision >= second


async def test_a_range_ends_where_its_prefix_ends(etcd: Etcd, keys: Keys) -> None:
    """A range contains exactly the keys with its prefix, even if the prefix ends in 0xff. Deleting it leaves the keys
    after it."""
    base = keys.registry
    for name in (b"a", b"a\xff", b"a\xff\xffz", b"b"):
        await etcd.put(base + name, b"")
    prefix = base + b"a\xff"
    assert [kv.key for kv in [kv async for kv in etcd.scan(prefix)]] == [prefix, base + b"a\xff\xffz"]
    assert await etcd.count(prefix, after_prefix(prefix)) == 2
    assert await etcd.delete_range(prefix, after_prefix(prefix)) == 2
    assert [kv.key for kv in [kv async for kv in etcd.scan(base)]] == [base + b"a", base + b"b"]


# --- ranges ---


async def test_pages_are_of_one_revision(etcd: Etcd, keys: Keys) -> None:
    """All pages of a scan show one revision, so writes and deletions during the scan are not seen."""
    names = await fill(etcd, keys.registry, 25)
    seen: list[KeyValue] = []
    async for page in etcd.pages(keys.registry, after_prefix(keys.registry), page_size=10):
        if not seen:
            await etcd.delete(names[12])
            await etcd.put(names[13], b"changed")
            await etcd.put(keys.registry + b"zzz", b"added")
        seen += page.kvs
    assert [kv.key for kv in seen] == names
    assert {kv.value for kv in seen} == {b"v"}


@pytest.mark.parametrize("count", [0, 1, 10, 11])
async def test_every_key_comes_once_whatever_the_page_size(etcd: Etcd, keys: Keys, count: int) -> None:
    names = await fill(etcd, keys.registry, count)
    assert [kv.key async for kv in etcd.scan(keys.registry, page_size=10)] == names


async def test_a_page_says_what_is_left(etcd: Etcd, keys: Keys) -> None:
    names = await fill(etcd, keys.registry, 5)
    page = await etcd.page(keys.registry, after_prefix(keys.registry), limit=2, keys_only=True)
    assert [(kv.key, kv.value) for kv in page.kvs] == [(names[0], b""), (names[1], b"")]
    assert page.more
    assert page.count == 5
    rest = await etcd.page(names[1] + b"\0", after_prefix(keys.registry), limit=5, revision=page.revision)
    assert [kv.key for kv in rest.kvs] == names[2:]
    assert not rest.more


async def test_pages_too_large_for_a_message_become_smaller(etcd: Etcd, keys: Keys) -> None:
    """If a page is too large for one message, the scan reads smaller pages, and returns all 18 values of 1 MB."""
    value = b"x" * 1_000_000
    names = [keys.registry + b"%d" % number for number in range(18)]
    for name in names:
        await etcd.put(name, value)
    with pytest.raises(EtcdError) as info:
        await etcd.page(keys.registry, after_prefix(keys.registry), limit=100)
    assert info.value.reason is Reason.TOO_LARGE
    assert sorted(names) == [kv.key async for kv in etcd.scan(keys.registry) if kv.value == value]
    await etcd.delete_range(keys.registry, after_prefix(keys.registry))


async def test_a_compacted_revision_is_named_so(own_etcd: EtcdServer) -> None:
    async with Etcd(own_etcd.settings) as etcd:
        old = await etcd.put(b"k", b"1")
        await etcd.put(b"k", b"2")
        await own_etcd.compact()
        with pytest.raises(EtcdCompacted):
            await etcd.page(b"k", b"l", limit=1, revision=old)


# --- transactions ---


async def test_a_transaction_does_one_branch_and_answers_for_each_operation(etcd: Etcd, keys: Keys) -> None:
    key, other = keys.model("a"), keys.model("b")
    await etcd.put(other, b"old")
    done = await etcd.txn(
        [absent(key)],
        [put_op(key, b"1"), get_op(other), delete_op(other), get_range_op(keys.registry, after_prefix(keys.registry))],
    )
    assert done.succeeded
    put, got, deleted, ranged = done.responses
    assert put is None
    assert isinstance(got, tuple)
    assert [kv.value for kv in got] == [b"old"]
    assert deleted == 1
    assert isinstance(ranged, tuple)
    assert [kv.key for kv in ranged] == [key]
    refused = await etcd.txn([absent(key)], [put_op(key, b"2")], [get_op(key)])
    assert not refused.succeeded
    assert refused.responses[0] == (KeyValue(key, b"1", done.revision, done.revision, 1, 0),)
    assert refused.revision == done.revision


async def test_compares_hold_and_fail_as_they_say(etcd: Etcd, keys: Keys) -> None:
    key, none = keys.model("a"), keys.model("none")
    first = await etcd.put(key, b"1")
    second = await etcd.put(key, b"2")
    whole = (keys.registry, after_prefix(keys.registry))
    holds = [
        created(key, "==", first),
        created(key, "<", second),
        created(none, "==", 0),
        modified(key, second),
        modified(none, 0),
        value_is(key, b"2"),
        value_is(key, b"1", "!="),
        leased(key, 0),
        exists(key),
        absent(none),
        absent_prefix(none),
        created_in_range(*whole, "==", first),
        created_in_range(*whole, ">", 0),
        absent_range(none, after_prefix(none)),
    ]
    fails = [
        created(key, "==", second),
        modified(key, first),
        value_is(key, b"1"),
        value_is(none, b""),
        leased(key, 7),
        exists(none),
        absent(key),
        absent_prefix(keys.registry),
        created_in_range(*whole, "!=", first),
    ]
    assert (await etcd.txn(holds, [])).succeeded
    for compare in fails:
        assert not (await etcd.txn([*holds, compare], [])).succeeded, compare


async def test_a_range_compare_is_a_claim_that_one_of_many_wins(etcd: Etcd, keys: Keys) -> None:
    prefix = keys.copies("m")

    async def claim(pod: str) -> bool:
        return (await etcd.txn([absent_prefix(prefix)], [put_op(keys.copy("m", pod), b"")])).succeeded

    wins = await asyncio.gather(*[claim(f"pod-{number}") for number in range(20)])
    assert sum(wins) == 1
    assert await etcd.count(prefix, after_prefix(prefix)) == 1


async def test_limits_of_a_transaction(etcd: Etcd, keys: Keys) -> None:
    many = [put_op(keys.model(str(number)), b"") for number in range(MAX_OPERATIONS + 1)]
    assert (await etcd.txn([], many[:-1])).succeeded
    with pytest.raises(EtcdError, match="too many operations"):
        await etcd.txn([], many)
    with pytest.raises(EtcdError) as info:
        await etcd.put(keys.model("big"), b"x" * 1_600_000)
    assert info.value.reason is Reason.TOO_LARGE
    assert (await etcd.txn([], [delete_range_op(keys.registry, after_prefix(keys.registry))])).responses == (128,)


async def test_writing_under_a_lease_that_is_gone(etcd: Etcd, keys: Keys) -> None:
    with pytest.raises(EtcdLeaseLost):
        await etcd.put(keys.pod("p"), b"", lease=12345)


# --- update ---


def plus_one(kv: KeyValue | None) -> bytes:
    return b"%d" % (int(kv.value) + 1 if kv else 1)


async def test_updates_from_many_sides_all_count(etcd: Etcd, keys: Keys) -> None:
    key = keys.model("counter")
    await asyncio.gather(*[etcd.update(key, plus_one) for _ in range(10)])
    kv = await etcd.get(key)
    assert kv is not None
    assert (kv.value, kv.version) == (b"10", 10)


async def test_an_update_says_what_it_found_and_left(etcd: Etcd, keys: Keys) -> None:
    key = keys.model("m")
    nothing = await etcd.update(key, lambda _: None)
    assert (nothing.changed, nothing.before, nothing.value, nothing.mod_revision) == (False, None, None, 0)
    made = await etcd.update(key, plus_one)
    assert (made.changed, made.before, made.value) == (True, None, b"1")
    same = await etcd.update(key, lambda kv: kv and kv.value)
    assert (same.changed, same.value, same.mod_revision) == (False, b"1", made.mod_revision)
    kv = await etcd.get(key)
    assert same.before == kv


async def test_an_exception_of_the_change_passes_through(etcd: Etcd, keys: Keys) -> None:
    def refuse(kv: KeyValue | None) -> bytes:
        raise LookupError("not like this")

    with pytest.raises(LookupError):
        await etcd.update(keys.model("m"), refuse)


async def test_a_write_of_unknown_outcome_is_settled_by_reading(etcd_server: EtcdServer, keys: Keys) -> None:
    """If the answer to an update is lost although etcd wrote it, the client finds that out by reading and does not
    write twice."""
    key = keys.model("counter")
    async with Proxy(etcd_server.port) as proxy:
        settings = EtcdSettings(endpoints=(proxy.endpoint,), timeout=0.5)
        async with Etcd(settings) as far, Etcd(etcd_server.settings) as near:
            await far.put(key, b"1")
            calls = 0

            def change(kv: KeyValue | None) -> bytes:
                nonlocal calls
                calls += 1
                if calls == 1:  # from here on, answers do not come back
                    proxy.swallow_answers()
                return plus_one(kv)

            update = asyncio.create_task(far.update(key, change, timeout=20))
            await until(lambda: _has(near, key, b"2"), why="the write is done")
            await until(lambda: far.statistics().failures, why="the writer has given up on its write")
            proxy.flow()
            done = await update
            assert (done.changed, done.value, calls) == (True, b"2", 1)
            kv = await near.get(key)
            assert kv is not None
            assert (kv.value, kv.version) == (b"2", 2)


async def _has(etcd: Etcd, key: bytes, value: bytes) -> bool:
    kv = await etcd.get(key)
    return kv is not None and kv.value == value


# --- bounds ---


async def test_a_dead_endpoint_fails_in_time_and_not_ambiguously() -> None:
    settings = EtcdSettings(endpoints=(f"http://127.0.0.1:{free_port()}",), timeout=0.3)
    async with Etcd(settings) as etcd:
        async with asyncio.timeout(10):
            for request in (etcd.get(b"k"), etcd.put(b"k", b"v"), etcd.update(b"k", plus_one), etcd.status()):
                with pytest.raises(EtcdUnavailable) as info:
                    await request
                assert not info.value.ambiguous
                assert info.value.reason is Reason.REGISTRY_AWAY
        assert etcd.statistics().repeats > 0


async def test_a_silent_endpoint_fails_in_time(etcd_server: EtcdServer) -> None:
    """Requests to a silent endpoint fail in time. An unanswered write is reported as ambiguous, an unanswered read is
    not."""
    async with Proxy(etcd_server.port) as proxy:
        async with Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as etcd:
            await etcd.get(b"k")
            proxy.swallow()
            async with asyncio.timeout(10):
                with pytest.raises(EtcdUnavailable) as info:
                    await etcd.put(b"k", b"v", timeout=0.1)
                assert info.value.ambiguous
                with pytest.raises(EtcdUnavailable) as info:
                    await etcd.get(b"k", timeout=0.1)
                assert not info.value.ambiguous


async def test_the_next_member_is_used_when_one_is_dead_or_silent(etcd_server: EtcdServer, keys: Keys) -> None:
    key = keys.model("m")
    async with Proxy(etcd_server.port) as proxy:
        dead = f"http://127.0.0.1:{free_port()}"
        settings = EtcdSettings(endpoints=(dead, proxy.endpoint, etcd_server.endpoint))
        async with Etcd(settings) as etcd:
            await asyncio.gather(*[etcd.put(key, b"1") for _ in range(10)])  # repeated: none reached the first
            assert etcd.statistics().endpoint == proxy.endpoint
            assert etcd.statistics().rotations == 1, "ten failures at one member are one reason to leave it"
            proxy.swallow()
            assert await etcd.get(key)  # the second endpoint gets its share of the time, then the third is asked
            assert etcd.statistics().endpoint == etcd_server.endpoint
            await asyncio.gather(*[etcd.put(key, b"2") for _ in range(5)])
            assert etcd.statistics().rotations == 2


async def test_a_write_whose_connection_breaks_is_not_repeated(etcd_server: EtcdServer, keys: Keys) -> None:
    """A write whose connection breaks before the answer is not repeated. The caller learns that it may have been
    carried out."""
    key = keys.model("m")
    async with Proxy(etcd_server.port) as proxy, Etcd(etcd_server.settings) as near:
        async with Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
            await far.get(key)
            proxy.swallow_answers()
            writing = asyncio.create_task(far.put(key, b"1"))
            await until(lambda: _has(near, key, b"1"), why="the write is done")
            proxy.flow_after_cut()
            with pytest.raises(EtcdUnavailable) as info:
                await writing
            assert info.value.ambiguous
            kv = await near.get(key)
            assert kv is not None
            assert kv.version == 1


async def test_a_cancelled_caller_leaves_its_request_alone(
    etcd_server: EtcdServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling a caller does not cancel its request, and the write is carried out. Cancelling the request would leak
    memory in gRPC."""
    key = keys.model("m")
    async with Proxy(etcd_server.port) as proxy, Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as etcd:
        await etcd.put(key, b"0")
        stub = etcd.connection._access.endpoints.current.kv
        put, calls = stub.Put, []

        def spy(*args: Any, **options: Any) -> Any:
            calls.append(put(*args, **options))
            return calls[-1]

        monkeypatch.setattr(stub, "Put", spy)
        proxy.swallow()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(etcd.put(key, b"1"), 0.05)
        (call,) = calls
        assert not call.done()
        proxy.flow()
        await until(call.done, why="the call is answered")
        assert not call.cancelled()
        assert await _has(etcd, key, b"1")


async def test_closing_ends_what_is_in_progress(etcd_server: EtcdServer) -> None:
    """Closing the client ends requests in progress with an error that gives the reason, and does not cancel their
    callers."""
    async with Proxy(etcd_server.port) as proxy:
        etcd = Etcd(EtcdSettings(endpoints=(proxy.endpoint,)))
        await etcd.get(b"k")
        proxy.swallow()
        waiting = asyncio.gather(etcd.get(b"k"), etcd.put(b"k", b"v"), return_exceptions=True)
        await until(lambda: etcd.statistics().requests == 3, why="both are under way")
        await etcd.close()
        read, write = await waiting
        assert isinstance(read, EtcdClosed)
        assert isinstance(write, EtcdClosed)
        assert (read.ambiguous, write.ambiguous) == (False, True)
        with pytest.raises(EtcdClosed):
            await etcd.get(b"k")
        await etcd.close()  # closing again does nothing


# --- endpoints, versions, the command line ---


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://127.0.0.1:2379", (False, "127.0.0.1:2379")),
        ("https://etcd.example/", (True, "etcd.example:2379")),
        ("http://[::1]:4001", (False, "[::1]:4001")),
    ],
)
def test_endpoints_are_read(endpoint: str, expected: tuple[bool, str]) -> None:
    assert parse_endpoint(endpoint) == expected


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:2379", "ftp://h:1", "http://", "http://h:port", "http://h:1/path"])
def test_what_is_no_endpoint_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(ValueError, match="is not an etcd endpoint"):
        Etcd(EtcdSettings(endpoints=(endpoint,)))


@pytest.mark.parametrize("endpoint", ["http://u:secret@h:1", "http://u:secret@h:port", "u:secret@h"])
def test_an_endpoint_with_a_password_is_refused_without_showing_it(endpoint: str) -> None:
    with pytest.raises(ValueError, match="contains a user name or password") as caught:
        Etcd(EtcdSettings(endpoints=(endpoint,)))
    assert "secret" not in str(caught.value)


def test_no_endpoint_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no etcd endpoint"):
        Etcd(EtcdSettings(endpoints=()))


async def test_status_tells_version_size_and_leader(etcd: Etcd, etcd_server: EtcdServer) -> None:
    status = await etcd.status()
    assert status.endpoint == etcd_server.endpoint
    assert status.version.startswith("3.")
    assert status.has_leader
    assert 0 < status.db_used_bytes <= status.db_bytes
    assert status.errors == ()
