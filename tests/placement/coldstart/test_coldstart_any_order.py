"""Properties of the cold-start machine that hold in any order of events.

Each step is something that can happen to a router: a caller comes or leaves, an answer arrives, the view changes, a pod
comes or goes, time passes, or the carrier makes a mistake.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from placement import choice
from placement.coldstart import events, instructions
from placement.coldstart.answers import FOLLOW
from placement.coldstart.events import Record, Sighting
from placement.coldstart.flight import EXPECTED, Phase
from placement.coldstart.machine import Machine
from placement.coldstart.problems import Problem, ProblemReason
from placement.coldstart.rules import Rules
from placement.coldstart.story import Impossible
from placement.failures import Failure, FailureKind
from placement.pod import Candidate

MODELS = ("m", "n")
PODS = ("a", "b", "c")
RULES = Rules(load_wait_ms=5_000, max_waiters=6, max_waiters_per_model=4, max_waiting_bytes=20, patience_ms=1_000)

models = st.sampled_from(MODELS)
pods = st.sampled_from(PODS)
records = st.builds(
    Record,
    st.integers(1, 2),
    load_ms=st.sampled_from((0, 0, 800)),
    quarantine=st.sampled_from(("", "", "", "it kills")),
    failures=st.lists(
        st.builds(Failure, pods, st.integers(-2000, 0), st.just("no"), st.sampled_from(FailureKind)),
        max_size=2,
        unique_by=lambda failure: failure.pod,
    ).map(tuple),
    marked=st.booleans(),
)
sightings = st.lists(
    st.builds(
        Sighting, pods, st.integers(1, 2), st.booleans(), st.booleans(), st.sampled_from((None, None, 0, 10_000))
    ),
    max_size=2,
    unique_by=lambda copy: copy.pod,
).map(tuple)
nothing = st.just({})
ANSWERS = {
    events.Recalled: st.fixed_dictionaries({"record": st.none() | records}),
    events.RecordRead: st.fixed_dictionaries({"record": records}),
    events.RecordMissing: nothing,
    events.ReadFailed: st.just({"problem": Problem(ProblemReason.REGISTRY_AWAY, "away")}),
    events.Seen: st.fixed_dictionaries({"copies": sightings, "pods": st.just(PODS)}),
    events.Loaded: st.fixed_dictionaries({"believed": st.booleans()}),
    events.Elsewhere: st.fixed_dictionaries({"pod": pods, "there": st.booleans()}),
    events.Refused: st.fixed_dictionaries({"reason": st.sampled_from(ProblemReason), "text": st.just("no")}),
    events.Failed: st.fixed_dictionaries(
        {
            "text": st.just("no"),
            "kind": st.sampled_from(FailureKind),
            "asked_ms": st.sampled_from((0, 0, 2000)),
            "reason": st.sampled_from(
                (ProblemReason.LOAD_FAILED, ProblemReason.LOAD_FAILED, ProblemReason.CONTENT_CHANGED)
            ),
        }
    ),
    events.Stale: nothing,
    events.Unreachable: nothing,
    events.TimedOut: nothing,
    events.Garbled: nothing,
    events.Broke: st.just({}),
}


class Router(RuleBasedStateMachine):
    """A carrier that acts only when a step says so, and keeps its own account of the machine's instructions."""

    @initialize(sizes=st.lists(st.sampled_from((0, 50, 200)), min_size=3, max_size=3))
    def begin(self, sizes: list[int]) -> None:
        self.machine = Machine(RULES)
        self.now_ms = 0
        self.wanted_ms: int | None = None
        self.pods = [
            Candidate(name, 100, size % 150, oldest_idle_ms=1000) for name, size in zip(PODS, sizes, strict=True)
        ]
        self.waiting: dict[int, tuple[str, int, int]] = {}  # model, bytes, until when
        self.told: Counter[int] = Counter()
        self.outstanding: dict[str, instructions.Request] = {}
        self.number = 0
        self.closes = False
        self.causes = 0

    def feed(self, event: events.Event) -> list[instructions.Instruction]:
        given = self.machine.handle(event)
        self.causes += 1
        for one in given:
            assert one.cause == self.causes, "each instruction names the event that led to it"
            match one:
                case instructions.WaitUntil(_, at_ms):
                    assert one is given[0]
                    assert self.wanted_ms is None or at_ms < self.wanted_ms
                    self.wanted_ms = at_ms
                case instructions.Request(_, model_id):
                    assert model_id not in self.outstanding, "a model has one open request at a time"
                    self.outstanding[model_id] = one
                case instructions.Hurry(_, model_id, pod, _):
                    asked = self.outstanding[model_id]
                    assert isinstance(asked, instructions.Ask)
                    assert (asked.pod, asked.idle_ms > 0) == (pod, True)
                case instructions.Release(_, waiter, waited_ms):
                    assert waited_ms <= RULES.load_wait_ms + self.late_ms(waiter)
                    self.told[waiter] += 1
                    self.waiting.pop(waiter, None)
        return given

    def late_ms(self, waiter: int) -> int:
        """Returns by how many milliseconds the machine missed the waiter's deadline."""
        waits = self.waiting.get(waiter)
        return 0 if waits is None else max(0, self.now_ms - waits[2])

    # --- waiters ---

    @rule(
        model_id=models,
        size=st.integers(0, 8),
        deadline=st.none() | st.integers(-10, 8_000),
        idle_ms=st.sampled_from((3_600_000, 0)),
        until_asked=st.booleans(),
    )
    def join(self, model_id: str, size: int, deadline: int | None, idle_ms: int, until_asked: bool) -> None:
        self.number += 1
        deadline_ms = None if deadline is None else self.now_ms + deadline
        until_ms = self.now_ms + RULES.load_wait_ms
        if deadline_ms is not None:
            until_ms = min(until_ms, deadline_ms)
        self.waiting[self.number] = model_id, size, until_ms
        given = self.feed(events.Joined(self.now_ms, model_id, self.number, size, deadline_ms, idle_ms, until_asked))
        told = {one.waiter for one in given if isinstance(one, instructions.Release)}
        assert told <= {self.number}, "a joining call is an event for itself alone"
        assert not any(isinstance(one, instructions.TellCopy) for one in given)

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.integers(1, self.number))
        model_id = self.waiting[waiter][0] if waiter in self.waiting else "m"
        given = self.feed(events.Left(self.now_ms, model_id, waiter))
        assert all(isinstance(one, instructions.Departed) for one in given)

    # --- answers ---

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        model_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        asked = self.outstanding.pop(model_id)
        if isinstance(asked, instructions.Choose):
            self.choose(asked, data.draw(st.sampled_from((0, 60, 1000))))
            return
        kinds = EXPECTED[PHASES[type(asked)]]
        if data.draw(st.integers(0, 9)):
            kinds = tuple(kind for kind in kinds if kind is not events.Broke)
        kind = data.draw(st.sampled_from(kinds))
        self.feed(kind(self.now_ms, model_id, asked.cause, **data.draw(ANSWERS[kind])))

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def answer_until_an_agent_is_asked(self, data: st.DataObject) -> None:
        """Answers up to five requests for one model, until an agent is asked. Random answers rarely get that far, and
        most interesting states come later."""
        model_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        for _ in range(5):
            if isinstance(self.outstanding.get(model_id), instructions.Ask | None):
                break
            self.lead_on(model_id)

    def lead_on(self, model_id: str) -> None:
        asked = self.outstanding.pop(model_id)
        head = self.now_ms, model_id, asked.cause
        match asked:
            case instructions.Recall():
                self.feed(events.Recalled(*head, None))
            case instructions.Read():
                self.feed(events.RecordRead(*head, Record(1)))
            case instructions.Look():
                self.feed(events.Seen(*head, (), PODS))
            case instructions.Choose():
                self.choose(asked, 60)
            case _:
                self.feed(events.Elsewhere(*head, "gone", there=False))

    def choose(self, asked: instructions.Choose, size: int) -> None:
        chosen = choice.choose(asked.model_id, size, self.pods, excluded=asked.excluded, idle_ms=asked.idle_ms)
        assert chosen.pod is None or chosen.pod not in asked.excluded
        self.feed(events.Chosen(self.now_ms, asked.model_id, asked.cause, chosen))

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data())
    def impossible_answer(self, data: st.DataObject) -> None:
        """Feeds an answer of the wrong kind, or to a request that was never sent. Expects an error and unchanged
        statistics."""
        model_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        asked = self.outstanding[model_id]
        kind = data.draw(st.sampled_from(sorted(ANSWERS, key=lambda kind: kind.__name__)))
        off = data.draw(st.integers(1, 3)) if kind in EXPECTED[PHASES[type(asked)]] else 0
        before = self.machine.statistics()
        with pytest.raises(Impossible):
            self.machine.handle(kind(self.now_ms, model_id, asked.cause + off, **data.draw(ANSWERS[kind])))
        assert self.machine.statistics() == before

    # --- the world ---

    @rule(model_id=models)
    def copies_change(self, model_id: str) -> None:
        self.feed(events.CopiesChanged(self.now_ms, model_id))

    @rule(pod=pods, gone=st.booleans())
    def pod_changes(self, pod: str, gone: bool) -> None:
        self.feed(events.PodChanged(self.now_ms, pod, gone))

    @rule(ms=st.sampled_from((1, 100, 500, 1_500, 6_000)))
    def time_passes(self, ms: int) -> None:
        """Lets time pass, and tells the machine the time at each of its alarms."""
        end = self.now_ms + ms
        while self.wanted_ms is not None and self.wanted_ms <= end:
            self.now_ms, self.wanted_ms = max(self.now_ms, self.wanted_ms), None
            self.feed(events.TimePassed(self.now_ms))
        self.now_ms = end

    @rule(ms=st.integers(0, 3_000))
    def time_is_told_late(self, ms: int) -> None:
        self.now_ms += ms
        self.wanted_ms = None
        self.feed(events.TimePassed(self.now_ms))

    @rule()
    def it_will_close(self) -> None:
        self.closes = True

    # --- what must hold ---

    @invariant()
    def each_is_told_once(self) -> None:
        assert all(count == 1 for count in self.told.values())
        assert self.told.keys().isdisjoint(self.waiting)
        assert self.told.keys() | self.waiting.keys() == set(range(1, self.number + 1))

    @invariant()
    def the_sums_are_right_and_bounded(self) -> None:
        found = self.machine.statistics()
        assert found.waiters == len(self.waiting) <= RULES.max_waiters
        assert found.bytes == sum(size for _, size, _ in self.waiting.values()) <= RULES.max_waiting_bytes
        for model_id in MODELS:
            waiting = [waits for waits in self.waiting.values() if waits[0] == model_id]
            assert len(waiting) <= RULES.max_waiters_per_model
            assert not waiting or self.machine.loading(model_id)

    @invariant()
    def deadlines_are_kept(self) -> None:
        """Checks that the machine's alarm is no later than the earliest deadline of a waiter."""
        if self.waiting:
            assert self.wanted_ms is not None
            assert self.wanted_ms <= min(until_ms for _, _, until_ms in self.waiting.values())

    @invariant()
    def no_flight_stays_without_a_reason(self) -> None:
        """Checks that each flight waits for an answer or for an alarm, and that each open request belongs to a
        flight."""
        for model_id in MODELS:
            if self.machine.loading(model_id) and model_id not in self.outstanding:
                assert self.wanted_ms is not None
        assert self.outstanding.keys() <= {model_id for model_id in MODELS if self.machine.loading(model_id)}

    def teardown(self) -> None:
        """Checks that a machine in any state comes to rest, either once pods answer and no waiter joins, or at once
        when it closes."""
        if not hasattr(self, "machine"):
            return
        if self.closes:
            self.feed(events.Closed(self.now_ms))
            assert self.machine.statistics().flights == 0
            self.feed(events.Joined(self.now_ms, "m", self.number + 1))
            self.number += 1
            for model_id in list(self.outstanding):
                self.lead_on(model_id)
            assert self.outstanding == {}
        began_ms = self.now_ms
        while self.machine.statistics().flights:
            assert self.now_ms - began_ms <= 60_000, "a flight never ends"
            if not self.outstanding:
                assert self.wanted_ms is not None
                self.time_passes(max(0, self.wanted_ms - self.now_ms))
            for model_id in list(self.outstanding):
                self.lead_on(model_id)
        self.each_is_told_once()
        assert self.waiting == {}
        assert self.machine._flights.alarms.earliest_ms() is None
        assert self.machine._flights.orphans == set()


PHASES = {
    instructions.Recall: Phase.RECALLING,
    instructions.Read: Phase.READING,
    instructions.Look: Phase.LOOKING,
    instructions.Choose: Phase.CHOOSING,
    instructions.Ask: Phase.ASKING,
}


def test_any_order_of_events():
    run_state_machine_as_test(Router, settings=settings(stateful_step_count=50))


def test_every_answer_has_its_phase_and_what_follows():
    answers = {kind.__name__ for kind in events.Answer.__subclasses__()}
    for table in ({kind for kinds in EXPECTED.values() for kind in kinds}, FOLLOW, {*ANSWERS, events.Chosen}):
        assert {kind.__name__ for kind in table} == answers
