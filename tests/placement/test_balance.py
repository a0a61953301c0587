"""The choice of the copy that answers a call."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.balance import least_loaded


@dataclass
class Copy:
    in_flight: int
    load: int = 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9), st.integers(0, 100))
def test_no_other_copy_has_less_to_do(loads, turn):
    """What a copy has to do is the sum of this router's calls in flight and the load that its pod reports."""
    index = least_loaded([Copy(*load) for load in loads], turn)
    assert sum(loads[index]) == min(sum(load) for load in loads)


def test_ties_go_round():
    """Copies that have equally little to do share the calls, and a busier copy gets none."""
    copies = [Copy(1), Copy(2), Copy(0, 1), Copy(1)]
    counts = Counter(least_loaded(copies, turn) for turn in range(400))
    assert counts[1] == 0
    assert min(counts[0], counts[2], counts[3]) >= 100


def test_none_to_choose_from():
    with pytest.raises(ValueError, match="no copies"):
        least_loaded([])
