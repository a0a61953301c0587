"""The news in the keys of pods, copies, lives and tombstones, reported in order. Other keys are skipped."""

import pytest

from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.records import CopyRecord, PodRecord
from router.state import published
from router.state.published import CopySaid, LifeSaid, PodSaid, TombstoneSaid

KEYS = Keys("test/mesh")
POD = PodRecord("i", "a:1", "a:2")
COPY = CopyRecord("i", 7, "loaded", 1000)


def test_each_kind_of_key_is_told_apart_in_order():
    """Each kind of key is recognised and reported in order. Deletions are recognised too, by the name of the key."""
    items = [
        (KEYS.copy("m", "a"), COPY.encode()),
        (KEYS.pod("a"), POD.encode()),
        (KEYS.life("a", "i"), b"{}"),
        (KEYS.tombstone("m"), b"{}"),
        (KEYS.copy("m", "a"), None),
        (KEYS.pod("a"), None),
        (KEYS.life("a", "i"), None),
        (KEYS.tombstone("m"), None),
    ]
    assert list(published.read(KEYS, items)) == [
        CopySaid("m", "a", COPY),
        PodSaid("a", POD),
        LifeSaid("a", "i", b"{}"),
        TombstoneSaid("m", True),
        CopySaid("m", "a", None),
        PodSaid("a", None),
        LifeSaid("a", "i", None),
        TombstoneSaid("m", False),
    ]


def test_a_pod_may_have_the_name_that_tombstones_have():
    """A pod may have the name that the keys of tombstones use, because the name is escaped in the pod's own keys."""
    (said,) = published.read(KEYS, [(KEYS.copy("m", TOMBSTONE), COPY.encode())])
    assert said == CopySaid("m", TOMBSTONE, COPY)


@pytest.mark.parametrize(
    "item",
    [
        (KEYS.leader, b"router-0"),
        (KEYS.owner, b"{}"),
        (KEYS.pods, POD.encode()),
        (KEYS.pod("a"), b"nonsense"),
        (KEYS.copy("m", "a"), b"{}"),
        (KEYS.all_copies + b"\xff/a", COPY.encode()),
        (KEYS.lives + b"\xff/i", b"{}"),
    ],
)
def test_what_cannot_be_read_is_passed_over(item):
    (said,) = published.read(KEYS, [item, (KEYS.pod("b"), POD.encode())])
    assert said == PodSaid("b", POD)
