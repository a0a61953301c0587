"""Retries: passing errors are retried a limited number of times, or for as long as a transfer makes progress."""

import pytest

from puller import retry
from puller.errors import Nature, PullError, PullErrorKind


class Store:
    """A store that fails as the test says, then succeeds. Pauses advance `clock`."""

    def __init__(self, *kinds: PullErrorKind) -> None:
        self.kinds = list(kinds)
        self.calls = 0
        self.pauses: list[float] = []
        self.written = 0
        self.step = 0
        self.told: float | None = None

    async def operation(self) -> str:
        self.calls += 1
        self.written += self.step
        if self.kinds:
            raise PullError(self.kinds.pop(0), "no", retry_after=self.told)
        return "done"

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def clock(self) -> float:
        return sum(self.pauses)

    async def run(self, policy: retry.RetryPolicy) -> str:
        return await retry.retried(
            self.operation, policy, progress=lambda: self.written, sleep=self.sleep, clock=self.clock
        )


POLICY = retry.RetryPolicy(attempts=4, first_pause=1.0, longest_pause=2.0, total=100.0)


async def test_what_may_pass_is_tried_again_with_growing_pauses():
    """Passing errors are retried with growing pauses, drawn below a bound that doubles."""
    store = Store(*[PullErrorKind.UNREACHABLE] * 3)
    assert await store.run(POLICY) == "done"
    assert store.calls == 4
    assert all(0 <= pause <= bound for pause, bound in zip(store.pauses, (1.0, 2.0, 2.0), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in PullErrorKind if not kind.retried])
async def test_what_is_final_is_not(kind):
    store = Store(kind)
    with pytest.raises(PullError) as caught:
        await store.run(POLICY)
    assert (caught.value.kind, store.calls) == (kind, 1)


async def test_attempts_are_bounded_and_told():
    store = Store(*[PullErrorKind.TIMEOUT] * 9)
    with pytest.raises(PullError, match="4 times"):
        await store.run(POLICY)
    assert store.calls == 4


async def test_time_is_bounded():
    """No attempt starts after the total time."""
    store = Store(*[PullErrorKind.TIMEOUT] * 99)
    with pytest.raises(PullError):
        await store.run(retry.RetryPolicy(attempts=1000, first_pause=8.0, longest_pause=8.0, total=20.0))
    assert sum(store.pauses[:-1]) <= 20.0
    assert store.calls < 99


async def test_a_transfer_that_gets_on_is_not_given_up():
    """A transfer continues as long as each attempt brings some bytes, because attempts that make progress are not
    counted."""
    store = Store(*[PullErrorKind.INTEGRITY] * 20)
    store.step = 1
    assert await store.run(POLICY) == "done"
    assert store.calls == 21


async def test_a_store_that_says_when_to_come_again_is_obeyed():
    """No attempt starts before the time that a store names. If that time is too late, the caller gets it in the
    error."""
    store = Store(*[PullErrorKind.BUSY] * 2)
    store.told = 5.0
    assert await store.run(POLICY) == "done"
    assert store.pauses == [5.0, 5.0]
    for told in (POLICY.longest_told + 1, POLICY.total):
        store = Store(*[PullErrorKind.BUSY] * 2)
        store.told = told
        with pytest.raises(PullError) as caught:
            await store.run(POLICY)
        assert (store.calls, store.pauses, caught.value.retry_after) == (1, [], told)


async def test_any_number_of_failures_overflows_nothing():
    """The pause stays bounded, and nothing overflows, after any number of failures."""
    store = Store(*[PullErrorKind.TIMEOUT] * 1500)
    policy = retry.RetryPolicy(attempts=10**6, first_pause=1.0, longest_pause=2.0, total=10**9)
    assert await store.run(policy) == "done"
    assert max(store.pauses) <= 2.0


@pytest.mark.parametrize("kind", PullErrorKind)
def test_what_is_retried_passes(kind):
    """Every failure that is retried at once is a passing one, so a later load may try again too."""
    assert not kind.retried or kind.nature is Nature.PASSING
