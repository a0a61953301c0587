"""The decision whether a process hangs, from observations alone and without a real clock."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.process.hang import Hang, HangLimits, HangVerdict, Observation, ProcessState

LIMITS = HangLimits()
STEP = LIMITS.interval


class Story:
    """Observations of one process, made from the events of a test. The clock starts anywhere."""

    def __init__(self, *, heard: float = 1000.0) -> None:
        self.hang = Hang(LIMITS)
        self.look = Observation(now=1000.0, state="S", cpu=5.0, runnable=False, heard=heard)
        self.verdict = self.hang.look(self.look)
        self.hung: float | None = None  # seconds of the story until it was first called hung
        self._began = 1000.0

    def go_on(
        self,
        seconds: float,
        *,
        state: str = "S",
        beats: bool = False,
        cpu: float = 0.0,  # CPU seconds per second
        runnable: bool = False,
        step: float = STEP,
    ) -> "Story":
        """Lets time pass while the process behaves as described, with an observation every `step` seconds."""
        end = self.look.now + seconds
        while self.look.now < end - 1e-9 and self.hung is None:
            now = self.look.now + step
            self.look = replace(
                self.look,
                now=now,
                state=state,
                cpu=self.look.cpu + cpu * step,
                runnable=runnable,
                heard=now if beats else self.look.heard,
            )
            self.verdict = self.hang.look(self.look)
            if self.verdict.doing is ProcessState.HUNG:
                self.hung = now - self._began
        return self


def test_a_process_that_beats_is_well() -> None:
    assert Story().go_on(3600, beats=True).verdict == HangVerdict(ProcessState.WELL)


def test_a_stopped_process_is_given_up_within_five_seconds() -> None:
    """A stopped process is suspect from the first look. The verdict also says that the process was stopped, because
    this is not the process's own fault."""
    story = Story().go_on(60, beats=True)
    story.go_on(STEP, state="T")
    assert (story.verdict.doing, story.verdict.stopped) == (ProcessState.SUSPECT, True)
    story.go_on(4, state="T")
    assert story.hung is not None
    assert (story.verdict.doing, story.verdict.stopped) == (ProcessState.HUNG, True)
    assert story.verdict.why == "was stopped by a signal for 3 s"


def test_a_silent_process_is_given_up_within_fifteen_seconds() -> None:
    story = Story().go_on(6)
    assert story.verdict.doing is ProcessState.SUSPECT
    story.go_on(9)
    assert (story.verdict.doing, story.verdict.stopped) == (ProcessState.HUNG, False)
    assert story.verdict.why == "gave no sign of life for 12 s"


def test_a_busy_loop_on_a_free_machine_is_silence() -> None:
    """The process gets all the CPU time that it wants, and still sends no heartbeat."""
    story = Story().go_on(15, state="R", runnable=True, cpu=1.0)
    assert story.hung is not None


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
def test_a_starved_process_has_the_time_that_it_was_given(share: float) -> None:
    """While a process waits for a CPU, only the CPU time that it gets counts: a minute with a tenth of a CPU counts as
    six seconds."""
    story = Story().go_on(60, state="R", runnable=True, cpu=share)
    assert story.hung is None
    assert story.hang.silent == pytest.approx(60 * share)


def test_whose_other_thread_waits_for_a_processor_is_starved_too() -> None:
    """A process is also starved if its event loop sleeps on a lock that is held by a thread waiting for a CPU."""
    assert Story().go_on(60, state="S", runnable=True, cpu=0.05).hung is None


def test_more_processor_time_than_time_has_passed_counts_once() -> None:
    """If several threads use more CPU time than has elapsed, only the elapsed time counts."""
    story = Story().go_on(5, state="R", runnable=True, cpu=16.0)
    assert story.hang.silent == pytest.approx(5)


def test_a_process_that_waits_for_a_disk_has_more_time_but_not_unlimited() -> None:
    story = Story().go_on(40, state="D")
    assert story.hung is None
    assert story.go_on(20, state="D").hung is not None


def test_time_in_which_the_watcher_was_late_does_not_count() -> None:
    """If the watcher looks every two seconds instead of twice a second, the delay does not count: the machine had no
    time for the other process either."""
    story = Story().go_on(40, step=2.0)
    assert story.hung is None
    assert story.go_on(20, step=2.0).hung is not None, "a watcher that is late does not spare the process forever"


@pytest.mark.parametrize("state", ["T", "S", "R"])
@pytest.mark.parametrize("before", [0.0, 2.5, 11.5])
def test_a_watcher_that_was_stopped_too_forgets_everything(state: str, before: float) -> None:
    """A watcher that was stopped together with the whole mesh forgets how long the process was silent. A process that
    is not yet awake gets the usual time."""
    story = Story().go_on(before, state="S" if before > 3 else state)
    assert story.hung is None
    story.go_on(3600, step=3600.0, state=state)
    assert story.verdict == HangVerdict(ProcessState.WELL)
    story.go_on(2.5, state=state)
    assert story.hung is None
    story.go_on(60, beats=True)
    assert story.verdict == HangVerdict(ProcessState.WELL)


def test_a_process_that_continues_is_healthy_again() -> None:
    """A process that continues is healthy again. Two short stops are not added up, and neither are two silences, if the
    process sent a heartbeat between them."""
    story = Story().go_on(2.5, state="T").go_on(1, beats=True)
    assert story.verdict == HangVerdict(ProcessState.WELL)
    assert story.go_on(2.5, state="T").go_on(1, beats=True).hung is None
    assert story.go_on(10).go_on(1, beats=True).go_on(10).hung is None


def test_a_debuggers_process_is_silent_rather_than_stopped_and_as_innocent() -> None:
    story = Story().go_on(10, state="t")
    assert story.hung is None
    story.go_on(5, state="t")
    assert (story.verdict.doing, story.verdict.stopped) == (ProcessState.HUNG, True)
    assert "debugger" in story.verdict.why


def test_a_process_that_has_never_beaten_is_given_its_start() -> None:
    """Before its first heartbeat, a process may be silent for 90 s. If it is stopped, it is given up as soon as any
    other."""
    story = Story(heard=0.0).go_on(80)
    assert story.verdict == HangVerdict(ProcessState.WELL)
    assert story.go_on(15).hung is not None
    assert Story(heard=0.0).go_on(4, state="T").hung is not None


_HAPPENINGS = st.tuples(
    st.sampled_from("RSDTtZ"),
    st.booleans(),  # runnable
    st.floats(0.0, 8.0),  # CPU of each second
    st.floats(0.0, 20.0),  # seconds since the last look
)


@given(st.lists(_HAPPENINGS, max_size=200))
def test_no_process_is_given_up_before_the_limits(happenings: list[tuple[str, bool, float, float]]) -> None:
    """Counted from the first observation or the last gap, at least 3 s pass before a process without heartbeats is
    given up, and at least 12 s if it was not stopped."""
    hang = Hang(LIMITS)
    now, cpu = 50.0, 0.0
    hang.look(Observation(now, "S", cpu, False, now))
    heard = since = now
    for state, runnable, rate, elapsed in happenings:
        now, cpu = now + elapsed, cpu + rate * elapsed
        if elapsed > LIMITS.gap:
            since = now
        verdict = hang.look(Observation(now, state, cpu, runnable, heard))
        if verdict.doing is ProcessState.HUNG:
            assert now - since >= min(LIMITS.stopped, LIMITS.silent) - 1e-6
            assert verdict.stopped or now - since >= LIMITS.silent - 1e-6
            return


@given(st.lists(st.tuples(st.sampled_from("RSDtZ"), st.booleans(), st.floats(0.0, 3.0)), max_size=200))
def test_who_beats_between_two_looks_is_always_well(happenings: list[tuple[str, bool, float]]) -> None:
    hang = Hang(LIMITS)
    now = 50.0
    hang.look(Observation(now, "S", 0.0, False, now))
    for state, runnable, elapsed in happenings:
        now += elapsed
        verdict = hang.look(Observation(now, state, 0.0, runnable, now + 0.001))
        now += 0.001
        assert verdict.doing is ProcessState.WELL
