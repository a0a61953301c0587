"""The move of copies to new content: the order of its steps, until no old copies are left."""

from hypothesis import given
from hypothesis import strategies as st

from placement.reload import ReloadingCopy, ReloadStep, step

OLD, NEW = 3, 4


def test_one_goes_first_and_the_others_follow_at_once() -> None:
    """A reload begins with one copy, so content that cannot be loaded costs only one load."""
    copies = [ReloadingCopy("b", OLD), ReloadingCopy("a", OLD), ReloadingCopy("c", 1)]
    first = step(copies, NEW, {})
    assert (first.beside, first.elsewhere, first.unload) == (("a",), False, ())
    after = step([ReloadingCopy("a", NEW), *copies[:1], copies[2]], NEW, {})
    assert after.beside == ("b", "c")
    assert step([ReloadingCopy("a", NEW), ReloadingCopy("b", NEW), ReloadingCopy("c", NEW)], NEW, {}).done


def test_where_there_is_no_room_for_both_the_old_goes_once_the_new_is_elsewhere() -> None:
    copies = [ReloadingCopy("a", OLD), ReloadingCopy("b", OLD)]
    assert step(copies, NEW, {"a": "full"}).beside == ("b",)
    assert step([copies[0], ReloadingCopy("b", NEW)], NEW, {"a": "full"}).unload == ("a",)


def test_where_no_pod_has_room_for_both_another_pod_takes_it() -> None:
    """If no holding pod has room for both copies, another pod takes the new one. The reason contains the holding pod's
    text."""
    todo = step([ReloadingCopy("a", OLD)], NEW, {"a": "a: full of others"})
    assert todo.elsewhere
    assert "a: full of others" in todo.why
    assert step([ReloadingCopy("a", OLD), ReloadingCopy("b", NEW)], NEW, {"a": "full"}).unload == ("a",)


def test_it_waits_for_loads_and_for_pods_that_cannot_be_asked() -> None:
    """A reload waits for loads in progress and for pods that cannot be asked. It unloads nothing before the new copy
    exists and can be reached."""
    for copies in (
        [ReloadingCopy("a", OLD, loaded=False)],
        [ReloadingCopy("a", OLD, reachable=False)],
        [ReloadingCopy("a", OLD, reachable=False), ReloadingCopy("b", NEW)],
    ):
        todo = step(copies, NEW, {})
        assert todo == ReloadStep(todo.why)
        assert "waits for a" in todo.why
    for new in (ReloadingCopy("b", NEW, loaded=False), ReloadingCopy("b", NEW, reachable=False)):
        todo = step([ReloadingCopy("a", OLD), new], NEW, {"a": "full"})
        assert todo == ReloadStep(todo.why)


def test_nothing_to_move_is_done() -> None:
    assert step([], NEW, {}).done
    assert step([ReloadingCopy("a", NEW + 1)], NEW, {}).done


HELD = st.builds(ReloadingCopy, st.sampled_from("abcdef"), st.integers(0, 5), st.booleans(), st.booleans())


@given(st.lists(HELD, unique_by=lambda copy: copy.pod), st.integers(0, 5), st.sets(st.sampled_from("abcdef")))
def test_the_last_callable_copy_is_never_unloaded(copies: list[ReloadingCopy], generation: int, full: set[str]) -> None:
    """A reload never unloads the last callable copy. Each step does something, waits with a reason, or ends with no old
    copies left."""
    todo = step(copies, generation, dict.fromkeys(full, "is full"))
    assert todo.why
    assert todo.done == all(copy.generation >= generation for copy in copies)
    if todo.unload:
        assert any(c.generation >= generation and c.loaded and c.reachable for c in copies if c.pod not in todo.unload)
    old = {copy.pod for copy in copies if copy.generation < generation and copy.loaded and copy.reachable}
    assert {*todo.beside, *todo.unload} <= old
    assert set(todo.unload) <= full
    assert not set(todo.beside) & full
