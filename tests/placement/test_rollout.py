"""The pods that a rollout replaces, derived from the pods alone."""

from hypothesis import given
from hypothesis import strategies as st

from placement.rollout import LASTS_MS, Member, group_of, outgoing

MINUTE = 60_000


def pods(group: str, *ages: int, labels: frozenset[str] = frozenset()) -> list[Member]:
    return [Member(f"runtime-{group}-abcd{index}", age * MINUTE, labels) for index, age in enumerate(ages)]


def test_the_old_group_is_outgoing_while_the_new_one_comes():
    """While a new group of pods starts, all pods of the older group are outgoing, with a reason that names the new
    group. No pod of the new group is outgoing."""
    found = outgoing(pods("7d4b9c", 300, 310) + pods("85f6cd", 1, 3))
    assert set(found) == {"runtime-7d4b9c-abcd0", "runtime-7d4b9c-abcd1"}
    assert "runtime-85f6cd" in found["runtime-7d4b9c-abcd0"]


def test_the_mark_ends_by_itself():
    """A rollout that stopped half way marks no pods once the new ones are no longer young."""
    assert outgoing(pods("7d4b9c", 300) + pods("85f6cd", LASTS_MS // MINUTE)) == {}


def test_a_rollout_that_is_undone_marks_the_other_group():
    """When a rollout is undone, the old group grows again and is no longer outgoing."""
    assert outgoing(pods("7d4b9c", 300, 1) + pods("85f6cd", 5)) == {}


def test_other_deployments_and_other_labels_are_no_replacement():
    """Pods of a second deployment, or with other labels, replace nothing when they start beside the first."""
    old = pods("7d4b9c", 300)
    assert outgoing([*old, Member("other-85f6cd-abcde", MINUTE)]) == {}
    assert outgoing(old + pods("85f6cd", 1, labels=frozenset({"gpu"}))) == {}


def test_names_that_tell_nothing_are_left_alone():
    """Pods whose names contain no group, as in a StatefulSet or on one machine, are never outgoing."""
    assert group_of("runtime-0") is None
    assert outgoing([Member("runtime-0", MINUTE), Member("runtime-1", 900 * MINUTE)]) == {}


@given(st.lists(st.tuples(st.sampled_from(["aaaaaa", "bbbbbb", "cccccc"]), st.integers(0, 100)), max_size=9))
def test_the_youngest_pod_is_never_outgoing(members):
    """Whatever the groups, the youngest pod is never outgoing, so some pod can always be chosen."""
    made = [Member(f"d-{group}-{index:05}", age * MINUTE) for index, (group, age) in enumerate(members)]
    found = outgoing(made)
    if made:
        youngest = min(made, key=lambda member: member.age_ms)
        assert youngest.name not in found
