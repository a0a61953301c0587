"""Eviction policies: laws that hold for all of them, and what each is for."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import room
from placement.policies import NAMES, Gdsf, Lru, Probation, named

MIB = 1 << 20


class Pod:
    """The copies of one pod with their uses, as a use board records them."""

    def __init__(self, policy: str) -> None:
        self.uses: dict[str, tuple[int, int]] = {}
        self.sizes: dict[str, int] = {}
        self.policy = named(policy, self.uses.__getitem__)
        self.now = 0

    def load(self, key: str, *, size: int = MIB, cost: float = 100) -> None:
        self.uses[key] = (self.now, 1)
        self.sizes[key] = size
        self.policy.add(key, size=size, cost=cost)

    def use(self, key: str) -> None:
        self.uses[key] = (self.now, self.uses[key][1] + 1)

    def evict(self, key: str) -> None:
        self.policy.remove(key, evicted_at=self.now)
        del self.uses[key]

    def order(self) -> list[str]:
        return self.policy.walk(lambda key: False)

    def first(self) -> str:
        return self.policy.walk(lambda key: True)[0]


def looks(pod: Pod):
    def look(key: str) -> room.ResidentCopy:
        return room.ResidentCopy(
            key, pod.sizes[key], pod.now - pod.uses[key][0], standing=pod.policy.standing(key, now=pod.now)
        )

    return look


steps = st.lists(
    st.tuples(st.sampled_from(["load", "use", "evict", "gone", "look"]), st.integers(0, 7), st.integers(1, 5)),
    max_size=60,
)


@pytest.mark.parametrize("policy", NAMES)
@given(steps=steps)
def test_the_order_is_whole_and_does_not_depend_on_when_it_is_looked_at(policy, steps):
    """The eviction order contains every copy once. Looking at it changes nothing, and equal histories give equal
    orders."""
    pod, unwatched = Pod(policy), Pod(policy)
    for step, number, pause in steps:
        key = f"m{number}"
        for each in (pod, unwatched):
            each.now += pause
            if step == "load" and key not in each.uses:
                each.load(key, size=MIB * (1 + number), cost=100 * (1 + number % 3))
            elif step == "use" and key in each.uses:
                each.use(key)
            elif step == "evict" and each.uses:
                each.evict(each.first())
            elif step == "gone" and key in each.uses:
                each.policy.remove(key)
                del each.uses[key]
        if step == "look":
            pod.order()
        assert pod.uses == unwatched.uses
        assert len(pod.policy) == len(pod.uses)
    order = pod.order()
    assert sorted(order) == sorted(pod.uses)
    assert pod.order() == order
    assert unwatched.order() == order
    assert all(key in pod.policy for key in order)


@pytest.mark.parametrize("policy", NAMES)
@given(steps=steps)
def test_standings_agree_with_the_order(policy, steps):
    """Copies sorted by their standing are in the order in which the policy would evict them."""
    pod = Pod(policy)
    for step, number, pause in steps:
        key = f"m{number}"
        pod.now += pause
        if step == "load" and key not in pod.uses:
            pod.load(key, cost=50 * (1 + number))
        elif step == "use" and key in pod.uses:
            pod.use(key)
        elif step == "evict" and pod.uses:
            pod.evict(pod.first())
    order = pod.order()
    standings = [pod.policy.standing(key, now=pod.now) for key in order]
    assert [s[1] for s in standings if s[0] == 1] == sorted(s[1] for s in standings if s[0] == 1)
    assert [s[0] for s in standings] == sorted(s[0] for s in standings)


@pytest.mark.parametrize("policy", NAMES)
def test_a_used_copy_outlives_an_equal_one_that_was_not(policy):
    pod = Pod(policy)
    pod.load("a")
    pod.now += 1
    pod.load("b")
    pod.now += 1
    pod.use("a")
    assert pod.first() == "b"


@pytest.mark.parametrize("policy", NAMES)
def test_a_look_at_the_first_does_not_read_them_all(policy):
    """Finding the first of 20,000 copies reads only a handful of them if none was used meanwhile."""
    reads = 0

    def uses(key: str) -> tuple[int, int]:
        nonlocal reads
        reads += 1
        return int(key), 1

    made = named(policy, uses)
    for number in range(20_000):
        made.add(str(number), size=MIB, cost=100)
    reads = 0
    for _ in range(100):
        (first,) = made.walk(lambda key: True)
        made.remove(first, evicted_at=20_000)
    assert reads < 2_000


@pytest.mark.parametrize("policy", NAMES)
def test_a_spare_goes_before_an_equal_sole_copy(policy):
    """A copy whose model has another copy elsewhere is evicted before an equal copy that is its model's only one."""
    pod = Pod(policy)
    pod.load("sole")
    pod.load("spare")
    for key in ("sole", "spare"):
        pod.now += 1
        pod.use(key)
    pod.now += 10
    pod.order()
    if "probation" in policy:  # proven copies: the queue has its own order
        pod.load("newcomer")
        pod.order()
    lower = pod.policy.standing("spare", now=pod.now, spare=True)
    assert lower < pod.policy.standing("spare", now=pod.now)
    assert lower < pod.policy.standing("sole", now=pod.now)


def test_lru_is_the_order_of_last_use():
    pod = Pod("lru")
    for key in "abc":
        pod.now += 1
        pod.load(key, size=MIB * 1000, cost=1)
    pod.now += 1
    pod.use("a")
    assert pod.order() == ["b", "c", "a"]


def test_gdsf_lets_go_of_what_is_large_or_quick_to_load():
    """Among equally used copies, `gdsf` first evicts large ones and those that load fast."""
    pod = Pod("gdsf")
    pod.load("small and slow", size=MIB, cost=1000)
    pod.load("large", size=100 * MIB, cost=1000)
    pod.load("quick", size=MIB, cost=50)
    assert pod.order() == ["large", "quick", "small and slow"]


def test_gdsf_forgets_what_is_not_used_any_more():
    """`gdsf` ranks unused copies ever lower as others are loaded and evicted, however valuable they once were."""
    pod = Pod("gdsf")
    pod.load("once hot", cost=1000)
    for _ in range(100):
        pod.use("once hot")
    for number in itertools.count():
        pod.now += 1
        pod.load(f"m{number}", cost=1000)
        pod.use(f"m{number}")
        first = pod.first()
        if first == "once hot":
            break
        if len(pod.uses) > 3:
            pod.evict(first)
        assert number < 1000


def test_gdsf_knows_the_time_of_a_use_that_it_learns_late():
    """If a use is reported late, `gdsf` values it by the inflation at the time of the use, not of the report."""
    late, prompt = Pod("gdsf"), Pod("gdsf")
    for pod in (late, prompt):
        pod.load("a", cost=100)
        pod.load("b", cost=300)
        pod.load("victim", cost=10)
        pod.now = 10
        pod.use("a")
        if pod is prompt:
            pod.order()
        for number in range(5):
            pod.now += 10
            pod.evict(pod.first()) if number == 0 else None
            pod.load(f"n{number}", cost=200)
    assert late.policy.standing("a", now=60) == prompt.policy.standing("a", now=60)
    assert late.order() == prompt.order()


def test_the_history_of_the_inflation_is_bounded():
    """After 20,000 evictions, the history of the inflation is still bounded, and ranks still grow."""
    uses: dict[str, tuple[int, int]] = {}
    policy: Gdsf[str] = Gdsf(uses.__getitem__)
    before = 0.0
    for now in range(20_000):
        key = str(now)
        uses[key] = (now, 1)
        policy.add(key, size=MIB, cost=100 + now % 7)
        rank = policy.standing(key, now=now)[1]
        if now > 10:
            policy.remove(policy.walk(lambda key: True)[0], evicted_at=now)
        if now % 1000 == 0:
            assert rank >= before
            before = rank
    assert len(policy._times) <= 4097


@pytest.mark.parametrize("base", ["lru", "gdsf"])
def test_a_scan_does_not_flush_what_is_used(base):
    """With probation, 1,000 models called once do not evict 20 others that were called twice; plain LRU evicts them."""

    def survivors(policy: str) -> int:
        pod = Pod(policy)
        for number in range(20):
            pod.load(f"hot{number}")
        for number in range(20):
            pod.now += 1
            pod.use(f"hot{number}")
        for number in range(1000):
            pod.now += 1
            pod.load(f"scan{number}")
            while len(pod.policy) > 25:
                pod.evict(pod.first())
        return sum(key.startswith("hot") for key in pod.uses)

    assert survivors("lru") == 0
    assert survivors(f"{base}+probation") == 20


def test_a_model_that_comes_back_soon_is_no_newcomer():
    """A model that is loaded again soon after its eviction from the probation queue counts as proven, not as new."""
    pod = Pod("lru+probation")
    pod.load("back")
    for number in range(5):
        pod.now += 1
        pod.load(f"m{number}")
    assert pod.first() == "back"
    pod.evict("back")
    pod.now += 1
    pod.load("back")
    pod.now += 1
    pod.load("later")
    # Newer models that have not proven themselves are evicted before this one.
    assert pod.order().index("back") > pod.order().index("m4")


def test_what_was_measured_counts():
    """A copy that turns out large ranks lower in `gdsf`, and the probation queue's sum of bytes stays exact."""
    pod = Pod("gdsf")
    pod.load("a", size=MIB, cost=200)
    pod.load("b", size=MIB, cost=100)
    assert pod.first() == "b"
    pod.policy.resize("a", size=10 * MIB, cost=200)
    assert pod.first() == "a"
    uses = {"a": (0, 1), "b": (1, 5)}
    queue: Probation[str] = Probation(Lru(uses.__getitem__), uses.__getitem__)
    queue.add("a", size=1, cost=1)
    queue.add("b", size=1, cost=1)
    queue.resize("a", size=100, cost=1)
    queue.remove("a")
    queue.remove("b")
    queue.remove("b")
    assert queue._bytes == len(queue) == 0


def test_an_unknown_policy_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="gdsf\\+probation"):
        named("lfu", dict[str, tuple[int, int]]().__getitem__)


@pytest.mark.parametrize("policy", NAMES)
@given(steps=steps, need=st.integers(1, 9))
def test_room_is_searched_in_the_order_of_the_policy(policy, steps, need):
    """`room.search` finds the same victims as `make_room` does over all copies, although it looks at only the first
    few."""
    pod = Pod(policy)
    for step, number, pause in steps:
        key = f"m{number}"
        pod.now += pause
        if step == "load" and key not in pod.uses:
            pod.load(key)
        elif step == "use" and key in pod.uses:
            pod.use(key)
        elif step == "evict" and pod.uses:
            pod.evict(pod.first())
    found = room.search(room.Need.of_host(need * MIB, 0, 100 * MIB), pod.policy, looks(pod))
    pod.order()
    whole = room.make_room(room.Need.of_host(need * MIB, 0, 100 * MIB), [looks(pod)(key) for key in pod.uses])
    assert (found.verdict, found.victims) == (whole.verdict, whole.victims)
