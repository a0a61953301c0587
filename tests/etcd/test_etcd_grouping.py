"""The grouping of events into complete revisions, however etcd splits its responses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.etcd import Delta, EtcdCompacted, EtcdDenied, EtcdUnavailable
from mesh.etcd.records import ChangeKind
from mesh.etcd.watch import Revisions, check
from mesh.pb import etcd_pb2 as pb
from tests.support.examples import examples


def put(revision: int, key: str = "k") -> pb.Event:
    return pb.Event(type=pb.Event.PUT, kv=pb.KeyValue(key=key.encode(), mod_revision=revision))


def brief(deltas: list[Delta]) -> list[tuple[int, str]]:
    return [(delta.revision, "".join(event.kv.key.decode() for event in delta.events)) for delta in deltas]


def test_a_whole_response_is_given_out_at_once() -> None:
    revisions = Revisions()
    assert brief(revisions.add([put(5, "a"), put(5, "b"), put(6, "c")], fragment=False)) == [(5, "ab"), (6, "c")]
    assert not revisions.holding


def test_only_the_last_revision_of_a_fragment_is_held_back() -> None:
    revisions = Revisions()
    assert brief(revisions.add([put(5, "a"), put(6, "b")], fragment=True)) == [(5, "a")]
    assert revisions.holding
    assert brief(revisions.add([put(6, "c"), put(7, "d")], fragment=True)) == [(6, "bc")]
    assert brief(revisions.add([put(7, "e")], fragment=False)) == [(7, "de")]
    assert not revisions.holding


def test_a_held_revision_is_complete_when_the_next_begins() -> None:
    revisions = Revisions()
    revisions.add([put(5, "a")], fragment=True)
    assert brief(revisions.add([put(6, "b")], fragment=False)) == [(5, "a"), (6, "b")]


def test_an_empty_last_fragment_completes_what_is_held() -> None:
    revisions = Revisions()
    revisions.add([put(5, "a")], fragment=True)
    assert brief(revisions.add([], fragment=False)) == [(5, "a")]


def test_a_deletion_is_told_from_a_write() -> None:
    event = pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=b"k", mod_revision=3))
    (delta,) = Revisions().add([put(3, "j"), event], fragment=False)
    assert [event.kind for event in delta.events] == [ChangeKind.PUT, ChangeKind.DELETE]


@settings(max_examples=examples(50))
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_any_cut_gives_the_same_revisions(sizes: list[int], data: st.DataObject) -> None:
    """The same revisions come out however they are spread over responses, and however each response is cut into
    fragments."""
    expected = [(revision, "x" * size) for revision, size in enumerate(sizes, 1)]
    revisions = Revisions()
    got: list[tuple[int, str]] = []
    rest = expected
    while rest:
        take = data.draw(st.integers(1, len(rest)))
        response, rest = rest[:take], rest[take:]
        events = [put(revision, "x") for revision, names in response for _ in names]
        while events:
            cut = data.draw(st.integers(1, len(events)))
            fragment, events = events[:cut], events[cut:]
            got += brief(revisions.add(fragment, fragment=bool(events)))
        assert not revisions.holding, "at the end of a response no revision may be held back"
    assert got == expected


def test_a_cancelled_watch_is_an_error_by_its_reason() -> None:
    """A watch that etcd cancels with a message on the open stream ends with an error that gives etcd's reason."""
    check(pb.WatchResponse(created=True))
    with pytest.raises(EtcdCompacted) as info:
        check(pb.WatchResponse(canceled=True, compact_revision=7))
    assert info.value.revision == 7
    for reason in ("etcdserver: permission denied", "etcdserver: invalid auth token"):  # etcd 3.5.1, 3.6
        with pytest.raises(EtcdDenied):
            check(pb.WatchResponse(created=True, canceled=True, cancel_reason=reason))
    with pytest.raises(EtcdUnavailable, match="no reason given"):
        check(pb.WatchResponse(canceled=True))
