"""The suspects for a model server's death: the crashed thread identifies them, and no model is blamed for a cause from
outside."""

import pytest

from placement.suspects import EndCause, Work, WorkKind, suspects

RUNS = Work("runs", WorkKind.RUNNING, thread=1, digest="r1")
LOADS = Work("loads", WorkKind.LOADING, thread=2)
IN_LOOP = Work("loop", WorkKind.RUNNING, thread=9, in_loop=True, digest="l1")
FREES = Work("frees", WorkKind.FREEING)


def names(cause: EndCause, *work: Work[str], thread: int = 0) -> list[tuple[str, bool]]:
    return [(suspect.model, suspect.sure) for suspect in suspects(cause, work, thread=thread)]


@pytest.mark.parametrize(
    ("cause", "thread", "expected"),
    [
        pytest.param(EndCause.CRASH, 1, [("runs", True)], id="crash-in-a-run"),
        pytest.param(EndCause.CRASH, 2, [("loads", True)], id="crash-in-a-load"),
        pytest.param(EndCause.CRASH, 9, [("loop", True)], id="crash-in-the-loop"),
        pytest.param(EndCause.CRASH, 7, [("runs", False), ("loads", False), ("loop", False)], id="crash-elsewhere"),
        pytest.param(EndCause.CRASH, 0, [("runs", False), ("loads", False), ("loop", False)], id="crash-somewhere"),
        pytest.param(EndCause.HANG, 0, [("loop", True)], id="hang"),
        pytest.param(EndCause.MEMORY, 0, [("runs", False), ("loads", False), ("loop", False)], id="memory"),
        pytest.param(EndCause.EXIT, 0, [("runs", False), ("loads", False), ("loop", False)], id="exit"),
        pytest.param(EndCause.KILLED, 1, [], id="killed"),
        pytest.param(EndCause.STOPPED, 1, [], id="stopped"),
        pytest.param(EndCause.REPLACED, 1, [], id="replaced"),
    ],
)
def test_how_it_ended_says_who_is_suspect(cause, thread, expected):
    assert names(cause, RUNS, LOADS, IN_LOOP, FREES, thread=thread) == expected


def test_a_hang_is_no_loads_fault():
    """No load is blamed for a hang. The suspects are the models that run in the event loop, or else those that run in
    threads."""
    assert names(EndCause.HANG, RUNS, LOADS, FREES) == [("runs", False)]
    assert names(EndCause.HANG, LOADS, FREES) == []


@pytest.mark.parametrize("cause", [EndCause.CRASH, EndCause.MEMORY, EndCause.EXIT])
def test_freeing_is_a_suspicion_only_where_nothing_else_was_going_on(cause):
    """Freeing a copy is suspect only if nothing else was going on, because copies come and go all the time."""
    assert names(cause, FREES) == [("frees", False)]
    assert names(cause, FREES, RUNS) == [("runs", False)]
    assert names(cause) == []


def test_a_model_that_is_at_work_in_many_threads_is_one_suspect():
    """A model at work in many threads is one suspect, with the digests of all its requests. If the crashed thread is
    known, only the digest of that thread's request counts."""
    more = [Work("runs", WorkKind.RUNNING, thread=10 + n, digest=f"r{n}") for n in range(3)]
    (suspect,) = suspects(EndCause.MEMORY, [RUNS, *more])
    assert (suspect.model, suspect.doing, suspect.digests) == ("runs", WorkKind.RUNNING, ("r1", "r0", "r2"))
    (suspect,) = suspects(EndCause.CRASH, [RUNS, *more], thread=12)
    assert (suspect.digests, suspect.sure) == (("r2",), True)
