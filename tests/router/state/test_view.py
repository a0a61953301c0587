"""The view of pods and copies after events in any order: each is callable, suspect or gone."""

import json

from hypothesis import given
from hypothesis import strategies as st

from mesh.schema.idset import IdSet
from mesh.schema.keys import Keys
from mesh.schema.records import LEAVING, LOADED, CopyRecord, PodRecord
from mesh.wire.client import Pool
from router.state.candidates import LATELY
from router.state.pods import News
from router.state.view import SETTLE, View
from tests.support.anyjson import NAMES, as_json, json_values
from tests.support.worlds import World


def two_pods() -> World:
    world = World()
    world.pod("a")
    world.pod("b")
    world.copy("m", "a")
    world.copy("m", "b")
    world.copy("n", "a")
    return world


def loaded(created: int, incarnation: str = "i", **more: object) -> CopyRecord:
    """Returns a copy as an agent's answer describes it."""
    return CopyRecord(incarnation, created, LOADED, **more)  # type: ignore[arg-type]


def test_a_loaded_copy_of_a_published_pod_can_be_called():
    world = two_pods()
    assert world.callable("m") == ["a", "b"]
    assert world.callable("n") == ["a"]
    assert world.get("n", "a").token == b"i.7"
    assert sum(map(len, world.view.copies.values())) == 3


def test_a_claim_is_known_but_not_callable():
    world = two_pods()
    world.claim("x", "b")
    assert world.callable("x") == []
    assert [copy.pod.name for copy in world.view.known("x")] == ["b"]
    world.copy("x", "b")
    assert world.callable("x") == ["b"]


def test_a_copy_withdrawn_is_gone_and_its_pod_stays():
    world = two_pods()
    world.withdraw("m", "a")
    assert world.callable("m") == ["b"]
    assert not world.view.pods["a"].suspect


def test_a_pod_whose_lease_ends_becomes_suspect_with_its_copies():
    """A pod whose lease ends becomes suspect, and so do its copies. They are still called, but the pod gets no new
    loads."""
    world = two_pods()
    world.claim("x", "a")
    world.lose("a")
    assert world.callable("m") == ["a", "b"]
    assert world.callable("n") == ["a"]
    assert world.get("n", "a").suspect
    assert not world.get("m", "b").suspect
    assert list(world.view.known("x")) == []
    (a, b) = sorted(world.view.candidates(0.0, "m"), key=lambda pod: pod.name)
    assert (a.accepts, b.accepts) == (False, True)
    assert "lease" in a.why_not


def test_every_lease_ends_at_once_and_everybody_comes_back():
    """If all leases end at once and return, as when etcd stalls, nothing is lost and no connection is made again."""
    world = two_pods()
    pools = list(world.pools)
    world.lose("a", "b")
    assert world.callable("m") == ["a", "b"]
    world.copy("m", "b")  # copies may come before their pod
    world.pod("b")
    world.pod("a")
    world.copy("m", "a")
    world.copy("n", "a")
    assert world.callable("m") == ["a", "b"]
    assert not any(copy.suspect for model in "mn" for copy in world.view.known(model))
    assert not any(pod.suspect for pod in world.view.pods.values())
    assert world.pools == pools


def test_a_pod_that_said_it_leaves_is_gone_at_once():
    world = two_pods()
    world.pod("a", state=LEAVING)
    (a, _) = sorted(world.view.candidates(0.0, "m"), key=lambda pod: pod.name)
    assert not a.accepts
    assert world.callable("n") == ["a"]
    pool = world.pool("a")
    world.lose("a")
    assert world.callable("n") == []
    assert world.callable("m") == ["b"]
    assert "a" not in world.view.pods
    assert pool.closed


_KEYS = Keys("test/mesh")
_PLACES = st.sampled_from(
    [
        *(_KEYS.pod("a"), _KEYS.pod("b"), _KEYS.copy("m", "a"), _KEYS.copy("m", "b"), _KEYS.leader, _KEYS.owner),
        *(_KEYS.pods + b"\xff", _KEYS.all_copies + b"\xff/a", _KEYS.all_copies + b"m/\xff"),
    ]
)


@given(st.data())
def test_nothing_that_stands_in_etcd_blinds_a_view(data):
    """Keys that cannot be read, whatever program wrote them, are left out of the view. Everything else stays
    visible."""
    view = View(_KEYS, Pool)
    for revision in range(data.draw(st.integers(1, 4))):
        items = []
        for key in data.draw(st.lists(_PLACES, max_size=4)):
            whole = PodRecord("i", "h:1", "h:2") if key.startswith(_KEYS.pods) else CopyRecord("i", 7, "loaded")
            fields = json.loads(whole.encode())
            for name in data.draw(st.lists(st.sampled_from([*fields, *NAMES]), max_size=2)):
                fields[name] = data.draw(json_values)
            items.append((key, as_json(fields).encode()))
        (view.delta if data.draw(st.booleans()) else view.snapshot)(revision + 1, items)
        view.settle(float(revision))
        view.candidates(float(revision), "m")
    sound = [(_KEYS.pod("z"), PodRecord("z", "h:1", "h:2").encode())]
    view.delta(9, [*sound, (_KEYS.copy("m", "z"), CopyRecord("z", 7, "loaded").encode())])
    assert "z" in [copy.pod.name for copy in view.copies["m"]]
    view.close()


def test_a_suspect_is_dropped_by_its_first_failed_call():
    world = two_pods()
    world.lose("a")
    world.view.failed(world.view.pods["a"], 5.0)
    assert world.callable("m") == ["b"]
    assert world.callable("n") == []
    assert "a" not in world.view.pods


def test_a_failure_of_a_pod_that_was_forgotten_harms_nobody():
    """A failed probe of a forgotten pod does no harm when it is noted late, even if another incarnation has the pod's
    name by then."""
    world = two_pods()
    world.lose("a")
    former = world.view.pods["a"]
    world.view.failed(former, 5.0)
    world.view.failed(former, 6.0)
    assert "a" not in world.view.pods
    world.pod("a", "j")
    world.copy("n", "a", "j")
    world.view.failed(former, 7.0)
    assert world.callable("n") == ["a"]
    assert world.view.pods["a"].failed_at == 0.0


def test_a_pod_that_failed_before_its_lease_ended_is_not_suspect_but_gone():
    world = two_pods()
    world.view.failed(world.view.pods["a"], 5.0)
    assert world.callable("n") == ["a"], "the pod may come back, and etcd still has its copy"
    world.lose("a")
    assert world.callable("n") == []


def test_a_new_incarnation_replaces_the_old_one():
    world = two_pods()
    world.lose("a")
    old = world.pool("a")
    world.pod("a", "second")
    assert world.callable("n") == []
    assert world.callable("m") == ["b"]
    assert old.closed
    assert world.pool("a") is not old
    world.copy("n", "a", "second")
    assert world.get("n", "a").token == b"second.7"


def test_a_new_incarnation_without_the_old_lease_having_ended():
    """If a pod restarts before its old lease has ended, its old copies are not called. When the old copies disappear
    later, nothing changes."""
    world = two_pods()
    world.pod("a", "second")
    assert world.callable("n") == []
    world.copy("m", "a", "second")
    world.withdraw("n", "a")
    assert world.callable("m") == ["b", "a"] or world.callable("m") == ["a", "b"]


def test_a_copy_of_an_incarnation_that_is_not_published_yet_waits_for_it():
    world = two_pods()
    world.copy("z", "a", "second")
    assert world.callable("z") == []
    world.pod("a", "second")
    assert world.callable("z") == ["a"]


def test_a_copy_of_an_unknown_pod_waits_for_it():
    world = World()
    world.copy("m", "late")
    assert world.callable("m") == []
    assert world.view.candidates(0.0, "m") == []
    world.pod("late")
    assert world.callable("m") == ["late"]


def test_an_id_registered_again_has_a_new_token():
    world = two_pods()
    before = world.get("n", "a")
    world.copy("n", "a", created=9)
    after = world.get("n", "a")
    assert after is not before
    assert after.token == b"i.9"
    world.view.drop(before)
    assert world.callable("n") == ["a"], "an old copy that is dropped late does not take the new one along"


def test_a_copy_that_is_not_here_is_forgotten_until_it_is_published_again():
    world = two_pods()
    world.view.drop(world.get("n", "a"))
    assert world.callable("n") == []
    world.copy("n", "a")
    assert world.callable("n") == ["a"]


def test_a_suspect_pod_whose_last_copy_is_dropped_is_gone():
    world = two_pods()
    world.lose("b")
    world.view.drop(world.get("m", "b"))
    assert "b" not in world.view.pods


def test_a_load_is_known_at_once_and_late_news_of_its_claim_do_not_undo_it():
    world = two_pods()
    pod = world.view.pods["b"]
    copy = world.view.loaded("x", pod, loaded(8, host_bytes=50))
    assert copy is not None
    assert world.callable("x") == ["b"]
    world.claim("x", "b", created=8)
    assert world.callable("x") == ["b"]
    world.copy("x", "b", created=8)
    assert world.get("x", "b") is copy
    world.withdraw("x", "b")
    assert world.callable("x") == []


def test_late_news_of_a_former_content_do_not_undo_a_reload():
    """Late news of former content does not undo a reload, and neither does the claim of a load, which has no generation
    yet. News that is newer than the agent's answer counts."""
    world = two_pods()
    pod = world.view.pods["a"]
    copy = world.view.loaded("n", pod, loaded(7, generation=2, digest="d"))
    assert copy is not None
    assert (copy.token, copy.record.digest) == (b"i.7.2", "d")
    world.copy("n", "a", generation=1)
    world.claim("n", "a")
    assert world.get("n", "a") is copy
    world.copy("n", "a", generation=2)
    assert world.get("n", "a") is copy
    world.copy("n", "a", generation=3)
    assert world.get("n", "a").token == b"i.7.3"
    world.copy("n", "a", generation=1)
    assert world.get("n", "a").token == b"i.7.1", "the mirror counts once it has caught up"


def test_a_load_answered_by_another_life_of_the_pod_is_not_believed():
    world = two_pods()
    pod = world.view.pods["b"]
    assert world.view.loaded("x", pod, loaded(8, "other")) is None
    world.pod("b", state=LEAVING)
    world.lose("b")
    assert world.view.loaded("x", pod, loaded(8)) is None
    assert world.callable("x") == []


def test_what_a_pod_does_not_publish_again_is_forgotten_after_a_while():
    """A copy that a pod does not publish again is forgotten after a while, because the agent may have evicted it."""
    world = two_pods()
    world.lose("a")
    world.pod("a")
    world.copy("m", "a")
    world.view.settle(10.0)
    world.view.settle(10.0 + SETTLE)
    assert world.callable("n") == ["a"]
    world.view.settle(10.1 + SETTLE)
    assert world.callable("n") == []
    assert world.callable("m") == ["b", "a"] or world.callable("m") == ["a", "b"]


def test_a_snapshot_after_a_compaction_tells_what_vanished_from_what_was_withdrawn():
    world = two_pods()
    keys = world.keys
    world.forget_silently(keys.copy("m", "b"))  # the copy was withdrawn while its pod stayed
    world.forget_silently(keys.pod("a"), keys.copy("m", "a"), keys.copy("n", "a"))  # its lease ended
    world.snapshot()
    assert world.callable("m") == ["a"]
    assert world.get("m", "a").suspect
    assert world.view.pods["a"].suspect


def test_a_snapshot_of_an_empty_etcd_loses_nothing():
    """A snapshot of an etcd that lost all data loses nothing here: live pods are still called."""
    world = two_pods()
    world.items.clear()
    world.snapshot()
    assert world.callable("m") == ["a", "b"]
    assert all(pod.suspect for pod in world.view.pods.values())


def test_records_that_cannot_be_read_harm_only_themselves():
    world = two_pods()
    keys = world.keys
    world.change(
        (keys.all_copies + b"\xff\xfe/\xff", b"{}"),
        (keys.copy("m", "c"), b"nonsense"),
        (keys.pods + b"\xff", b"{}"),
        (keys.pod("d"), b'{"incarnation": 3}'),
        (keys.leader, b"whatever"),
    )
    world.change((keys.all_copies + b"\xff\xfe/\xff", None), (keys.pods + b"\xff", None))
    world.snapshot()
    assert world.callable("m") == ["a", "b"]


def test_a_watcher_of_a_model_learns_of_its_changes_alone():
    world = two_pods()
    changes: list[str] = []
    unwatch = world.view.watch("x", lambda: changes.append("x"))
    world.copy("n", "b")
    assert not changes
    world.claim("x", "b")
    world.copy("x", "b")
    world.withdraw("x", "b")
    assert len(changes) == 3
    unwatch()
    world.copy("x", "b")
    assert len(changes) == 3


def test_listeners_are_told_of_pods():
    world = World()
    news: list[tuple[str, News]] = []
    world.view.listen(lambda name, what: news.append((name, what)))
    world.pod("a")
    world.copy("m", "a")
    world.lose("a")
    world.view.failed(world.view.pods["a"], 1.0)
    assert news == [("a", News.PUBLISHED), ("a", News.SUSPECT), ("a", News.GONE)]


def test_why_a_pod_gets_no_loads():
    world = World()
    world.pod("old", protocol=(90, 91))
    world.pod("starting", state="starting")
    world.pod("silent")
    world.pod("fine")
    world.view.pods["silent"].agent_failed_at = 9.5
    why = {pod.name: pod.why_not for pod in world.view.candidates(10.0, "m")}
    assert "protocol" in why["old"]
    assert "starting" in why["starting"]
    assert "did not answer" in why["silent"]
    assert why["fine"] == ""
    assert all(pod.accepts for pod in world.view.candidates(20.0, "m") if pod.name == "silent")


def test_a_suspect_whose_last_copy_is_withdrawn_is_forgotten():
    """A suspect pod is forgotten when its last copy is published again and then withdrawn."""
    world = World()
    world.pod("a")
    world.copy("m", "a")
    world.lose("a")
    world.copy("m", "a")
    world.withdraw("m", "a")
    assert not world.view.pods


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["pod", "restart", "leave", "copy", "claim", "withdraw", "lose", "drop", "failed", "late", "snapshot"]
        ),
        st.sampled_from("ab"),
        st.sampled_from("mn"),
    ),
    max_size=25,
)


@given(ACTIONS)
def test_whatever_happens_the_indexes_agree(actions):
    """The view's indexes agree after any sequence of events. After a snapshot with all pods published, exactly the
    loaded copies of present incarnations are callable, and none is suspect."""
    world = World()
    lives = {"a": 0, "b": 0}
    seen = []  # pods, forgotten ones too: callers still hold them
    for action, pod, model in actions:
        life = f"i{lives[pod]}"
        match action:
            case "pod":
                world.pod(pod, life)
            case "restart":
                lives[pod] += 1
                world.pod(pod, f"i{lives[pod]}")
            case "leave":
                world.pod(pod, life, state=LEAVING)
            case "copy":
                world.copy(model, pod, life)
            case "claim":
                world.claim(model, pod, life)
            case "withdraw":
                world.withdraw(model, pod)
            case "lose":
                world.lose(pod)
            case "drop":
                for copy in list(world.view.known(model)):
                    world.view.drop(copy)
            case "failed" if pod in world.view.pods:
                world.view.failed(world.view.pods[pod], 1.0)
            case "late":
                for one in seen:
                    world.view.failed(one, 1.0)
            case "snapshot":
                world.snapshot()
        seen += [one for one in world.view.pods.values() if one not in seen]
        check(world)
    for pod in "ab":
        world.pod(pod, f"i{lives[pod]}")
    world.snapshot()
    check(world)
    for model in "mn":
        held = {
            world.keys.copy_of(key)[1]
            for key, value in world.items.items()
            if key.startswith(world.keys.copies(model))
            and b'"loaded"' in value
            and f'"i{lives[world.keys.copy_of(key)[1]]}"'.encode() in value
        }
        assert set(world.callable(model)) == held
        assert not any(copy.suspect for copy in world.view.copies.get(model, ()))


def check(world: World) -> None:
    view = world.view
    for model, copies in view.copies.items():
        assert copies
        for copy in copies:
            assert copy.callable
            assert copy.pod.pool is not None
            assert view.pods[copy.pod.name] is copy.pod
            assert copy.pod.copies[model] is copy
    for pod in view.pods.values():
        for model, copy in pod.copies.items():
            assert copy in view.known(model)
            assert (copy in view.copies.get(model, ())) == copy.callable
        assert not pod.suspect or pod.copies, "a suspect pod without copies is forgotten"


def test_the_pods_that_have_a_models_files_are_known():
    """From what pods publish, the view knows which of them have a model's files. It ignores invalid values."""
    world = World()
    world.pod("a", disk=IdSet.of(["m", "n"]).encode())
    world.pod("b", disk="\N{SNOWMAN}")
    world.pod("c")
    assert [pod.name for pod in world.view.candidates(0.0, "m") if pod.on_disk] == ["a"]
    assert not any(pod.on_disk for pod in world.view.candidates(0.0, "other"))
    world.pod("a", disk=IdSet.of(["n"]).encode())
    assert not any(pod.on_disk for pod in world.view.candidates(0.0, "m"))


def test_pods_that_a_rollout_replaces_are_told_apart_by_age():
    """Pods that a rollout replaces are recognised by their age. The router's own clock continues the age that a pod
    last published."""
    world = World()
    world.pod("cpu-6b8d9f7c5d-aaaaa", age_ms=7_200_000)
    world.pod("cpu-6b8d9f7c5d-bbbbb", age_ms=7_200_000)
    world.view.settle(100.0)
    assert not any(pod.outgoing for pod in world.view.candidates(100.0, "m"))
    world.pod("cpu-5f4c8b7d69-ccccc")
    world.pod("gpu-7d9c5b6f48-ddddd", labels=("gpu",))
    world.view.settle(101.0)
    outgoing = {pod.name for pod in world.view.candidates(101.0, "m") if pod.outgoing}
    assert outgoing == {"cpu-6b8d9f7c5d-aaaaa", "cpu-6b8d9f7c5d-bbbbb"}
    world.view.settle(101.0 + 3600)  # a rollout that stopped half way has ended by then
    assert not any(pod.outgoing for pod in world.view.candidates(3701.0, "m"))


# --- lives


def test_when_a_life_lost_its_presence_is_known_only_as_far_as_it_was_seen():
    """The revision at which a life lost its presence is known only if the loss was seen. History at a wrong revision
    would show a pod without copies. After a snapshot the revision is unknown, because the pod may have come back and
    been cut off again."""
    keys = Keys("base")
    view = View(keys, Pool)
    pod = (keys.pod("a"), PodRecord("i", "h:1", "h:2").encode())
    life = (keys.life("a", "i"), b"{}")
    view.snapshot(5, [pod, life])
    view.delta(6, [(keys.pod("a"), None)])
    assert view.lives.ended == {("a", "i"): 6}
    view.delta(7, [pod, life])
    assert view.lives.ended == {}
    view.delta(8, [(keys.pod("a"), None)])
    assert view.lives.ended == {("a", "i"): 8}
    view.snapshot(20, [life])
    assert view.lives.ended == {}
    assert view.open_lives() == [("a", "i")]


def test_pods_that_leave_in_order_leave_nothing_behind():
    """Nothing is left of a pod that leaves in order, whether its presence or its life is deleted first."""
    keys = Keys("base")
    view = View(keys, Pool)
    presence, life = (keys.pod("a"), None), (keys.life("a", "i"), None)
    for number, events in enumerate(([presence, life], [life, presence], [[presence], [life]], [[life], [presence]])):
        record = PodRecord("i", "h:1", "h:2", state=LEAVING).encode()
        view.delta(10 * number + 1, [(keys.pod("a"), record), (keys.life("a", "i"), b"{}")])
        steps = events if isinstance(events[0], list) else [events]
        for step, items in enumerate(steps):
            view.delta(10 * number + 2 + step, items)
        assert (view.pods, view.lives.standing, view.lives.ended) == ({}, {}, {})


def test_pods_that_have_just_gone_are_remembered_for_a_while():
    """A pod that has gone, in order or not, is remembered with its types until it comes back, or for some minutes."""
    world = World()
    world.pod("left", state=LEAVING, types=("a",))
    world.pod("died", types=("b",))
    world.lose("left")
    world.lose("died")
    assert {(pod.name, pod.types, pod.accepts) for pod in world.view.gone()} == {
        ("left", frozenset({"a"}), False),
        ("died", frozenset({"b"}), False),
    }
    world.view.settle(1000.0)
    world.pod("died", "another", types=("b",))
    assert [pod.name for pod in world.view.gone()] == ["left"]
    world.view.settle(1000.0 + LATELY)
    assert [pod.name for pod in world.view.gone()] == ["left"]
    world.view.settle(1001.0 + LATELY)
    assert world.view.gone() == []
