"""Sets of ids that may contain ids by mistake but never miss one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.schema.idset import EMPTY, MAX_IDS, IdSet

IDS = st.sets(st.text(max_size=30), max_size=200)


@given(IDS)
def test_whatever_is_in_it_is_found_also_after_its_way_through_etcd(ids):
    """A set that was encoded for etcd and decoded again still contains all of its ids."""
    decoded = IdSet.decode(IdSet.of(ids).encode())
    assert all(one in decoded for one in ids)


def test_few_others_are_found_and_it_stays_small():
    """A set with the maximum number of ids stays small, and contains less than 2 % of other ids by mistake."""
    made = IdSet.of(f"customer-{number}/churn" for number in range(MAX_IDS))
    assert len(made.encode()) < 6500
    wrong = sum(f"other-{number}" in made for number in range(10_000))
    assert wrong < 200


def test_the_empty_set():
    assert IdSet.of([]).encode() == ""
    assert "a" not in IdSet.of([])
    assert "a" not in IdSet.decode("")
    assert IdSet.decode("") is EMPTY


@given(st.text(max_size=200))
def test_nonsense_is_an_error_or_a_set(text):
    """Decoding any text, as another program may have put them into etcd, gives a set or raises ValueError."""
    try:
        assert ("a" in IdSet.decode(text)) in (True, False)
    except ValueError:
        pass


@pytest.mark.parametrize("text", ["\N{SNOWMAN}", '"', "0" * 20_000])
def test_what_cannot_be_one(text):
    with pytest.raises(ValueError, match="set of ids"):
        IdSet.decode(text)
