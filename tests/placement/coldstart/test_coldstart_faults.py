"""Ways in which a cold start can fail: the machine's next instructions, and the callers' errors."""

import pytest

from placement.coldstart import events, instructions
from placement.coldstart.events import Record, Sighting
from placement.coldstart.problems import ProblemReason
from placement.coldstart.rules import Rules
from placement.failures import MAX_FAILURES, Failure, FailureKind
from placement.pod import Candidate
from tests.support.coldstarts import RECORD, Carrier

HOUR_MS = 3_600_000
RULES = Rules()


def asking(*pods, record=RECORD, rules=None, **more):
    """Returns a carrier for which one caller has joined and the record has been read, so it normally asks an agent
    now."""
    carrier = Carrier(*pods, rules=rules)
    carrier.join(**more)
    carrier.read(record)
    return carrier


def reason(carrier, waiter="w"):
    return carrier.problems[waiter].reason


# --- the way through ---


def test_a_model_without_a_copy_is_read_chosen_asked_and_told():
    carrier = Carrier("a")
    given = carrier.join()
    assert [type(one) for one in given] == [instructions.WaitUntil, instructions.Recall, instructions.Read]
    assert [type(given) for given in carrier.read()] == [instructions.Look, instructions.Choose, instructions.Ask]
    assert carrier.asked == ["a"]
    assert [type(given) for given in carrier.says(events.Loaded)] == [instructions.Ended, instructions.TellCopy]
    assert carrier.served == ["w"]
    assert not carrier.machine.loading("m")


def test_each_instruction_carries_its_cause():
    carrier = Carrier("a")
    carrier.join()
    carrier.read()
    carrier.says(events.Loaded)
    assert [(type(given), given.cause) for given in carrier.given] == [
        (instructions.WaitUntil, 1),
        (instructions.Recall, 1),
        (instructions.Read, 2),
        (instructions.Look, 3),
        (instructions.Choose, 4),
        (instructions.Ask, 5),
        (instructions.Ended, 6),
        (instructions.TellCopy, 6),
    ]


def test_a_remembered_record_is_not_read_again():
    """A remembered record is not read again, because the agent's claim validates it."""
    carrier = Carrier("a")
    carrier.remembered["m"] = RECORD
    carrier.join()
    assert carrier.every(instructions.Read) == []
    assert carrier.asked == ["a"]


def test_a_remembered_record_that_tells_of_failures_is_read_again():
    """A remembered record with a quarantine is read again, because an admin may have released the model through another
    router."""
    carrier = Carrier("a")
    carrier.remembered["m"] = Record(7, marked=True, quarantine="it kills")
    carrier.join()
    carrier.read(RECORD)
    assert carrier.asked == ["a"]


def test_a_copy_that_turns_up_is_enough():
    carrier = Carrier("a")
    carrier.join()
    carrier.copies["m"] = [Sighting("a", 7, usable=True, present=True)]
    carrier.read()
    assert carrier.served == ["w"]
    assert carrier.asked == []


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(Sighting("a", 6, usable=True, present=True), id="of-a-former-registration"),
        pytest.param(Sighting("a", 7, usable=False, present=False), id="of-a-pod-that-is-gone"),
    ],
)
def test_a_copy_that_may_not_be_called_is_none(copy):
    carrier = Carrier("a", "b")
    carrier.copies["m"] = [copy]
    carrier.join()
    carrier.read()
    assert len(carrier.asked) == 1
    assert carrier.served == []


# --- what is not registered ---


def test_unknown_is_told_to_those_who_came_before_the_read_began_and_the_others_are_read_for_again():
    """If a model is unknown, its record is read again for callers that came after the read had begun: the model may
    have been registered since."""
    carrier = Carrier("a")
    carrier.join("early")
    carrier.join("late")
    carrier.read(None)
    assert reason(carrier, "early") is ProblemReason.UNKNOWN_MODEL
    assert list(carrier.problems) == ["early"]
    carrier.read(RECORD)
    carrier.says(events.Loaded)
    assert carrier.served == ["late"]


def test_unknown_ends_the_flight_if_nobody_came_later():
    carrier = Carrier("a")
    carrier.join()
    carrier.leave()
    carrier.read(None)
    assert carrier.problems == {}
    assert not carrier.machine.loading("m")


def test_a_registry_that_is_away_is_told():
    carrier = Carrier("a")
    carrier.join()
    away = events.Problem(ProblemReason.REGISTRY_AWAY, "etcd does not answer")
    carrier.says(events.ReadFailed, problem=away)
    assert carrier.problems == {"w": away}


def test_a_stale_record_is_forgotten_and_read_again():
    """A record is stale if its id was registered again after the record was read."""
    carrier = asking("a")
    given = carrier.says(events.Stale)
    assert [type(one) for one in given] == [instructions.ForgetRecord, instructions.Read]
    assert given[1].fresh
    carrier.read(Record(9))
    assert len(carrier.asked) == 2


def test_an_agent_that_calls_every_record_stale_is_given_up():
    carrier = asking("a")
    for _ in range(RULES.max_stale):
        carrier.says(events.Stale)
        carrier.read()  # the read finds the same registration: the agent is behind
        assert len(carrier.outstanding) == 0
        carrier.after(RULES.pause_ms)
        carrier.read()
    carrier.says(events.Stale)
    carrier.read()
    assert reason(carrier) is ProblemReason.UNAVAILABLE
    assert "does not accept the current registration" in carrier.problems["w"].text
    assert len(carrier.asked) == RULES.max_stale + 1


# --- claims ---


def test_elsewhere_is_followed():
    carrier = asking("a", "b")
    (first,) = carrier.asked
    other = "b" if first == "a" else "a"
    carrier.says(events.Elsewhere, pod=other)
    assert carrier.asked == [first, other]


@pytest.mark.parametrize(
    ("named", "text"),
    [
        pytest.param({"pod": "gone", "there": False}, "claimed by gone, which is not in view", id="gone"),
        pytest.param({"pod": "", "there": False}, "claimed by an unknown pod, which is not in view", id="nobody"),
        pytest.param({"pod": "a"}, "claimed by a, which is not in view", id="itself"),
        pytest.param({"pod": "b", "agent_failed_ms": 0}, "claimed by b, which does not answer", id="silent"),
    ],
)
def test_a_claim_of_a_pod_that_is_not_there_is_waited_for_and_told_if_it_stays(named, text):
    """Only the pod with the claim may load the model. If this pod is missing or does not answer, callers wait for the
    claim to end with the pod's lease, and get an error if it stays too long."""
    carrier = asking("a")
    while carrier.machine.loading("m"):
        if "agent_failed_ms" in named:
            named["agent_failed_ms"] = carrier.now_ms
        carrier.says(events.Elsewhere, **named)
        if carrier.problems:
            break
        assert carrier.outstanding == {}
        carrier.after(RULES.pause_ms)
        carrier.read()
    assert reason(carrier) is ProblemReason.UNAVAILABLE
    assert text in carrier.problems["w"].text
    assert 3 * RULES.patience_ms < carrier.now_ms <= 3 * RULES.patience_ms + RULES.pause_ms


def test_nobody_is_waited_for_only_a_lease_time():
    carrier = asking("a")
    carrier.leave()
    while carrier.machine.loading("m"):
        carrier.says(events.Elsewhere, pod="gone", there=False)
        if carrier.machine.loading("m"):
            carrier.after(RULES.pause_ms)
            carrier.read()
    assert RULES.patience_ms < carrier.now_ms <= RULES.patience_ms + RULES.pause_ms


def test_a_change_of_the_view_ends_the_pause_at_once():
    carrier = asking("a")
    carrier.says(events.Elsewhere, pod="b", there=False)
    assert carrier.outstanding == {}
    (read,) = carrier.changed()
    assert isinstance(read, instructions.Read)
    assert carrier.changed() == []
    carrier.copies["m"] = [Sighting("b", 7, usable=True, present=True)]
    carrier.read()
    assert carrier.served == ["w"]


def test_a_change_during_the_question_leaves_no_pause():
    """No pause follows if the view changes during a request to an agent, because the pause might wait for that very
    change."""
    carrier = asking("a")
    carrier.changed()
    carrier.says(events.Elsewhere, pod="b", there=False)
    assert isinstance(carrier.outstanding["m"], instructions.Read)


def test_a_claim_in_view_is_joined_instead_of_a_second_load():
    carrier = Carrier("a", "b")
    carrier.copies["m"] = [Sighting("b", 7, usable=False, present=True)]
    carrier.join()
    carrier.read()
    assert carrier.asked == ["b"]
    assert carrier.every(instructions.Choose) == []


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(Sighting("b", 6, usable=False, present=True), id="of-a-former-registration"),
        pytest.param(Sighting("b", 7, usable=False, present=False), id="of-a-pod-that-is-gone"),
        pytest.param(Sighting("b", 7, usable=False, present=True, agent_failed_ms=-499), id="of-a-silent-agent"),
    ],
)
def test_a_claim_that_leads_nowhere_is_not_joined(copy):
    carrier = Carrier("a", "b")
    carrier.copies["m"] = [copy]
    carrier.join()
    carrier.read()
    assert carrier.every(instructions.Choose) != []


def test_a_claim_of_a_load_that_has_failed_is_not_joined():
    """The claim of a failed load is not joined, although an outdated view still shows it."""
    carrier = Carrier("a")
    carrier.copies["m"] = [Sighting("a", 7, usable=False, present=True)]
    carrier.join()
    carrier.read()
    carrier.says(events.Failed, text="line 3 is wrong")
    assert carrier.asked == ["a"]
    assert carrier.problems["w"].text.startswith("line 3 is wrong (")


def test_an_answer_from_another_incarnation_is_not_believed():
    carrier = asking("a")
    carrier.says(events.Loaded, believed=False)
    assert carrier.served == []
    carrier.feed(events.PodChanged(carrier.now_ms, "a"))
    carrier.read()
    carrier.says(events.Loaded)
    assert carrier.served == ["w"]


# --- agents that do not answer ---


@pytest.mark.parametrize("answer", [events.Unreachable, events.TimedOut])
def test_an_agent_that_does_not_answer_is_no_reason_to_wait(answer):
    carrier = asking("a", "b")
    (first,) = carrier.asked
    carrier.pods[first] = Candidate(first, 1 << 30, accepts=False, why_not="has just not answered")
    carrier.says(answer)
    assert len(set(carrier.asked)) == 2


def test_a_pod_that_is_gone_is_not_asked_again():
    """A pod that was reported gone twice, and is no longer in the view, is not asked again."""
    carrier = asking("a")
    for _ in range(2):
        carrier.feed(events.PodChanged(carrier.now_ms, "a", gone=True))
    carrier.pods.clear()
    carrier.says(events.Unreachable)
    assert carrier.asked == ["a"]
    assert carrier.problems["w"].text == "there is no runtime pod"


def test_an_answer_of_another_version_is_waited_out():
    carrier = asking("a")
    carrier.says(events.Garbled)
    assert carrier.outstanding == {}
    carrier.after(RULES.pause_ms)
    carrier.read()
    carrier.says(events.Loaded)
    assert carrier.served == ["w"]


# --- failures ---


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.LASTING])
def test_what_passes_is_told_with_a_time_and_tried_again_by_the_next_caller(kind):
    """A failure of any kind except a lasting one excludes the pod for a second. A caller during this second gets the
    recorded failure; for a caller after it, the pod tries the load again."""
    carrier = asking("a")
    given = carrier.says(events.Failed, text="the store answers 503", kind=kind)
    assert isinstance(given[0], instructions.ForgetRecord)
    expected = {FailureKind.PASSING: ProblemReason.NOT_FETCHED, FailureKind.MEMORY: ProblemReason.NO_ROOM}.get(
        kind, ProblemReason.LOAD_FAILED
    )
    assert reason(carrier) is expected
    assert carrier.problems["w"].retry_ms == (1000 if kind is FailureKind.PASSING else None)
    assert "`mesh release m`" in carrier.problems["w"].text
    record = Record(7, marked=True, failures=(Failure("a", 0, "the store answers 503", kind, recorded=1),))
    carrier.join("soon")
    carrier.read(record)
    assert reason(carrier, "soon") is expected
    assert carrier.asked == ["a"], "the second call does not ask the pod"
    carrier.after(1000)
    carrier.join("later")
    carrier.read(record)
    assert carrier.asked == ["a", "a"]
    carrier.says(events.Loaded)
    assert carrier.served == ["later"]


def test_what_a_caller_has_seen_fail_is_not_tried_again_for_it_however_short_the_pause():
    carrier = asking("a", "b")
    carrier.after(60_000)
    carrier.says(events.Failed, text="one", kind=FailureKind.PASSING)
    carrier.after(30_000)
    carrier.says(events.Failed, text="two", kind=FailureKind.PASSING)
    assert sorted(carrier.asked) == ["a", "b"]
    assert carrier.problems["w"].text.startswith("two")


def test_a_store_that_asks_to_be_left_alone_is_asked_by_no_other_pod():
    carrier = asking("a", "b")
    carrier.says(events.Failed, text="too many requests", kind=FailureKind.PASSING, asked_ms=5000)
    assert len(carrier.asked) == 1
    assert carrier.problems["w"].retry_ms == 5000


def test_after_failures_in_three_pods_the_callers_get_the_models_own_error():
    carrier = asking("a", "b", "c", "d")
    for number in range(MAX_FAILURES):
        carrier.says(events.Failed, text=f"line {number} is wrong")
    assert len(set(carrier.asked)) == MAX_FAILURES
    assert reason(carrier) is ProblemReason.LOAD_FAILED
    assert carrier.problems["w"].text.startswith("line 2 is wrong (")
    assert set(carrier.problems["w"].details["pods"].split(", ")) == set(carrier.asked)


def test_a_failure_of_a_former_registration_does_not_count():
    carrier = asking("a")
    carrier.says(events.Failed, text="no")
    carrier.join("next")
    carrier.read(Record(8))
    assert carrier.asked == ["a", "a"]


@pytest.mark.parametrize("final", [ProblemReason.QUARANTINED, ProblemReason.NOWHERE, ProblemReason.CONTENT_CHANGED])
def test_what_holds_for_every_pod_is_told_at_once(final):
    """A failure that would occur in every pod is reported at once, without asking another pod. An example is other
    content under the same registration."""
    carrier = asking("a", "b")
    carrier.says(events.Failed, text="both digests", reason=final)
    assert len(carrier.asked) == 1
    assert (reason(carrier), carrier.problems["w"].text) == (final, "both digests")


def test_a_quarantined_model_is_not_loaded_but_a_copy_that_is_being_made_is_joined():
    record = Record(7, quarantine="it died on Monday", marked=True)
    carrier = asking("a", record=record)
    assert carrier.asked == []
    assert (reason(carrier), carrier.problems["w"].text) == (ProblemReason.QUARANTINED, "it died on Monday")
    carrier.copies["m"] = [Sighting("a", 7, usable=False, present=True)]
    carrier.join("next")
    carrier.read(record)
    assert carrier.asked == ["a"]


def test_broken_models_make_no_pod_unhealthy():
    """A broken model is loaded before each good one. Both pods still get good models."""
    carrier = Carrier("a", "b")
    for number in range(20):
        carrier.join(model_id=f"bad{number}")
        carrier.read(model_id=f"bad{number}")
        while f"bad{number}" in carrier.outstanding:
            carrier.says(events.Failed, f"bad{number}", text="broken")
        carrier.join(model_id=f"good{number}")
        carrier.read(model_id=f"good{number}")
        carrier.says(events.Loaded, f"good{number}")
    good = [ask.pod for ask in carrier.every(instructions.Ask) if ask.model_id.startswith("good")]
    assert min(good.count("a"), good.count("b")) >= 3


def test_a_pod_in_which_everything_fails_gets_no_more_loads():
    carrier = Carrier("broken", "well")
    carrier.pods["broken"] = Candidate("broken", 1 << 50)
    for number in range(8):
        model_id = f"m{number}"
        carrier.join(model_id=model_id)
        carrier.read(model_id=model_id)
        while model_id in carrier.outstanding:
            broken = carrier.asked[-1] == "broken"
            carrier.says(events.Failed if broken else events.Loaded, model_id, **({"text": "no"} if broken else {}))
    assert carrier.asked.count("broken") == 4
    assert carrier.asked[-4:] == ["well"] * 4
    carrier.feed(events.PodChanged(carrier.now_ms, "broken", gone=True))
    carrier.join(model_id="after")
    carrier.read(model_id="after")
    assert carrier.asked[-1] == "broken", "another pod of that name starts without failures"


# --- refusals ---


def test_what_fits_nowhere_is_refused_without_asking():
    carrier = Carrier("a")
    carrier.size = 1 << 40
    carrier.join()
    carrier.read()
    assert carrier.asked == []
    assert reason(carrier) is ProblemReason.NOWHERE
    assert "more than the capacity of any pod" in carrier.problems["w"].text


def test_a_pod_that_finds_out_that_a_model_fits_nowhere_has_its_record_read_again():
    """When a pod finds that a model fits nowhere, the model's record is read again. The size that the pod has found is
    then known, and no other pod is asked."""
    carrier = asking("a", "b")
    given = carrier.says(events.Refused, reason=ProblemReason.NOWHERE, text="it takes 400 MiB")
    assert [type(one) for one in given] == [instructions.ForgetRecord, instructions.Read]
    carrier.size = 400 << 30
    carrier.read()
    assert len(carrier.asked) == 1
    assert reason(carrier) is ProblemReason.NOWHERE


@pytest.mark.parametrize(
    ("refusals", "told"),
    [
        pytest.param([ProblemReason.NO_ROOM], ProblemReason.NO_ROOM, id="no-room"),
        pytest.param(
            [ProblemReason.UNAVAILABLE, ProblemReason.OVERLOADED], ProblemReason.OVERLOADED, id="overloaded-somewhere"
        ),
        pytest.param([ProblemReason.QUARANTINED], ProblemReason.QUARANTINED, id="quarantined"),
        pytest.param([ProblemReason.UNKNOWN_MODEL], ProblemReason.UNKNOWN_MODEL, id="unregistered-meanwhile"),
    ],
)
def test_refusals_become_the_answer_when_no_pod_is_left(refusals, told):
    carrier = asking(*"abc"[: len(refusals)])
    for number, refusal in enumerate(refusals):
        carrier.says(events.Refused, reason=refusal, text=f"no {number}")
    assert reason(carrier) is told
    assert len(carrier.asked) == len(refusals)


@pytest.mark.parametrize("refusal", [ProblemReason.UNAVAILABLE, ProblemReason.REGISTRY_AWAY, ProblemReason.INTERNAL])
def test_a_pod_that_is_not_up_to_it_is_passed_over_and_asked_again_later(refusal):
    """If each pod refuses a load because it cannot load at the moment, a pod is asked again after a pause."""
    carrier = asking("a", "b")
    carrier.says(events.Refused, reason=refusal, text="its server restarts")
    assert sorted(carrier.asked) == ["a", "b"]
    carrier.says(events.Refused, reason=refusal, text="its server restarts")
    assert carrier.problems == {}
    carrier.after(RULES.pause_ms)
    carrier.read()
    assert len(carrier.asked) == 3
    carrier.says(events.Loaded)
    assert carrier.served == ["w"]


def test_only_some_pods_are_asked_in_one_go():
    carrier = asking(*(f"p{number}" for number in range(30)))
    while "m" in carrier.outstanding:
        carrier.says(events.Refused, reason=ProblemReason.NO_ROOM, text="full")
    assert reason(carrier) is ProblemReason.NO_ROOM
    assert len(carrier.asked) == RULES.max_refusals


def test_no_pod_is_asked_for_room_that_nobody_waits_for_any_more():
    """Once the deadlines of all callers have passed, a refusal for lack of room ends the flight."""
    carrier = asking("a", "b", deadline_ms=5000)
    carrier.after(5000)
    assert reason(carrier) is ProblemReason.DEADLINE
    carrier.says(events.Refused, reason=ProblemReason.NO_ROOM, text="60 MiB are busy")
    assert len(carrier.asked) == 1
    assert not carrier.machine.loading("m")


def test_an_immediate_refusal_is_followed_up_even_without_a_caller():
    """After a pod's immediate refusal, the next pod is asked even if no caller waits, because the next caller will want
    the model too."""
    carrier = asking("a", "b")
    carrier.leave()
    carrier.says(events.Refused, reason=ProblemReason.NO_ROOM, text="full")
    assert len(carrier.asked) == 2


# --- waiting ---


def test_callers_wait_for_their_turn_within_their_deadline():
    carrier = asking("a", deadline_ms=60_000)
    carrier.after(59_999)
    assert carrier.problems == {}
    carrier.says(events.Loaded)
    assert carrier.served == ["w"]


def test_a_deadline_before_the_expected_end_is_told_at_once_and_the_load_goes_on():
    carrier = asking("a", record=Record(7, load_ms=20_000), deadline_ms=5000)
    assert (reason(carrier), carrier.problems["w"].retry_ms) == (ProblemReason.NOT_IN_TIME, 20_000)
    assert carrier.problems["w"].text == "loading m takes 20.0 s more, but the deadline is in 5.0 s"
    carrier.join("later", deadline_ms=6000)
    assert reason(carrier, "later") is ProblemReason.NOT_IN_TIME
    carrier.join("patient", deadline_ms=60_000)
    carrier.says(events.Loaded)
    assert carrier.served == ["patient"]


def test_a_load_later_than_expected_refuses_no_caller():
    carrier = asking("a", record=Record(7, load_ms=1), deadline_ms=5000)
    carrier.after(5)
    carrier.join("second", deadline_ms=500)
    assert carrier.problems == {}


def test_a_call_that_joins_makes_a_quiet_load_urgent_once():
    carrier = asking("a", waiter="quiet", idle_ms=HOUR_MS)
    (ask,) = carrier.every(instructions.Ask)
    assert ask.idle_ms == HOUR_MS
    carrier.join("call")
    carrier.join("another")
    (hurry,) = carrier.every(instructions.Hurry)
    assert (hurry.pod, hurry.why) == (ask.pod, ask.why)
    carrier.says(events.Loaded)
    assert carrier.served == ["quiet", "call", "another"]


def test_an_agent_that_has_answered_is_not_hurried():
    carrier = asking("a", waiter="quiet", idle_ms=HOUR_MS)
    carrier.says(events.Stale)
    carrier.join("call")
    assert carrier.every(instructions.Hurry) == []
    carrier.read()
    assert [ask.idle_ms for ask in carrier.every(instructions.Ask)] == [HOUR_MS]
    carrier.after(RULES.pause_ms)
    carrier.read()
    assert [ask.idle_ms for ask in carrier.every(instructions.Ask)] == [HOUR_MS, 0]


def test_a_load_that_no_call_waits_for_takes_no_room_from_what_was_used_later():
    carrier = Carrier()
    carrier.pods["a"] = Candidate("a", 100, 100, oldest_idle_ms=1000)
    carrier.size = 100
    carrier.join(idle_ms=HOUR_MS)
    carrier.read()
    assert reason(carrier) is ProblemReason.NO_ROOM
    assert carrier.problems["w"].text.startswith("Nowhere available to load: ")


def test_one_who_waits_until_an_agent_was_asked_is_told_then():
    carrier = Carrier("a")
    carrier.join("begin", until_asked=True)
    carrier.join("call")
    carrier.read()
    assert [told.waiter for told in carrier.every(instructions.TellAsked)] == ["begin"]
    carrier.join("again", until_asked=True)
    assert [told.waiter for told in carrier.every(instructions.TellAsked)] == ["begin", "again"]
    carrier.says(events.Loaded)
    assert carrier.served == ["call"]


def test_no_pods_at_all_is_told():
    carrier = asking()
    assert (reason(carrier), carrier.problems["w"].text) == (ProblemReason.UNAVAILABLE, "there is no runtime pod")


def test_a_mistake_of_the_carrier_ends_the_flight_and_is_told():
    carrier = asking("a")
    carrier.says(events.Broke)
    assert reason(carrier) is ProblemReason.INTERNAL
    assert not carrier.machine.loading("m")
