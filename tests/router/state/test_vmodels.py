"""The vmodels that the feed delivers, and what reads of etcd add while the feed lags."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mesh.etcd import KeyValue
from mesh.schema.keys import Keys
from router.state.vmodels import Vmodels

KEYS = Keys("test/mesh")


def item(name: str, active: str | None) -> tuple[bytes, bytes | None]:
    return KEYS.vmodel(name), None if active is None else b'{"amid":"%b","tmid":"%b"}' % (2 * (active.encode(),))


def read(vmodels: Vmodels, name: str, active: str | None, revision: int) -> None:
    """Reports that a read of etcd has found this record."""
    key, value = item(name, active)
    vmodels.read(name, None if value is None else KeyValue(key, value, 1, revision, 1, 0), revision)


def active(vmodels: Vmodels, name: str) -> str | None:
    record = vmodels.get(name)
    return None if record is None else record.active


@pytest.fixture
def vmodels() -> Vmodels:
    """Returns the vmodels of a worker to which the feed has delivered one."""
    made = Vmodels(KEYS)
    made.snapshot(10, [item("fraud", "fraud@7")])
    return made


def test_the_feed_creates_changes_and_deletes(vmodels):
    """Calls see each change as soon as the feed delivers it."""
    vmodels.delta(11, [item("fraud", "fraud@8"), item("other", "m")])
    assert (active(vmodels, "fraud"), active(vmodels, "other")) == ("fraud@8", "m")
    vmodels.delta(12, [item("fraud", None)])
    assert active(vmodels, "fraud") is None
    vmodels.snapshot(20, [item("third", "m")])
    assert vmodels.names() == ["third"]


def test_a_name_with_slashes_is_the_rest_of_its_key(vmodels):
    """A name may contain slashes, because ModelMesh writes names into keys unchanged."""
    vmodels.delta(11, [item("team/a é", "m")])
    assert active(vmodels, "team/a é") == "m"


def test_listeners_are_told_what_has_changed(vmodels):
    """A listener gets the name of each vmodel that was created, changed or deleted, but not of those that stayed the
    same."""
    told: list[str] = []
    vmodels.listen(told.append)
    vmodels.snapshot(11, [item("fraud", "fraud@7"), item("new", "m")])
    vmodels.delta(12, [item("fraud", "fraud@8")])
    vmodels.snapshot(13, [item("fraud", "fraud@8")])
    assert told == ["new", "fraud", "new"]


def test_a_record_that_cannot_be_read_counts_as_missing(vmodels):
    """A vmodel whose record cannot be read counts as missing: its former models are not called, and the log names
    it."""
    with capture_logs() as lines:
        vmodels.delta(11, [(KEYS.vmodel("fraud"), b"{"), item("other", "m")])
    assert active(vmodels, "fraud") is None
    assert active(vmodels, "other") == "m"
    assert [line["vmodel"] for line in lines] == ["fraud"]


def test_a_read_counts_until_the_feed_has_passed_it(vmodels):
    """A read that is newer than the feed is believed, and older changes from the feed do not undo it."""
    read(vmodels, "new", "m", 15)
    assert active(vmodels, "new") == "m"
    vmodels.delta(12, [item("new", "former")])
    assert active(vmodels, "new") == "m"
    vmodels.delta(16, [item("new", None)])
    assert active(vmodels, "new") is None


def test_a_read_that_the_feed_has_passed_is_ignored(vmodels):
    """A read whose answer arrives late does not restore a vmodel that has been deleted since."""
    vmodels.delta(20, [item("fraud", None)])
    read(vmodels, "fraud", "fraud@7", 15)
    assert active(vmodels, "fraud") is None


CHANGES = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["m", "n", None])), min_size=1, max_size=12)


@given(CHANGES, st.data())
def test_reads_and_the_feed_in_any_order_never_go_back(changes, data):
    """While etcd changes, the feed follows with a delay and reads happen at any time. After a read of a name, the
    worker knows the vmodel's state as of the read or later. Once the feed has caught up, the worker knows what etcd
    has."""
    vmodels = Vmodels(KEYS)
    history = [(revision, *change) for revision, change in enumerate(changes, start=1)]
    fed = 0

    def at(name: str, revision: int) -> str | None:
        values = [value for number, one, value in history if one == name and number <= revision]
        return values[-1] if values else None

    for now in range(1, len(history) + 1):
        for name in data.draw(st.lists(st.sampled_from("ab"), max_size=2)):
            read(vmodels, name, at(name, now), now)
            since = {at(name, revision) for revision in range(now, len(history) + 1)}
            assert active(vmodels, name) in since
        if data.draw(st.booleans()):
            for number, name, value in history[fed:now]:
                vmodels.delta(number, [item(name, value)])
            fed = now
    for number, name, value in history[fed:]:
        vmodels.delta(number, [item(name, value)])
    assert {name: active(vmodels, name) for name in "ab"} == {name: at(name, len(history)) for name in "ab"}
