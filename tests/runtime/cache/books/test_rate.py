"""The rate of calls per minute."""

from mesh.runtime.cache.books.rate import Rate


def test_the_rate_is_that_of_the_last_minute() -> None:
    """The rate falls to zero once the last call is more than a minute ago. In the first seconds it is computed as if 15
    s had passed, so that a few calls do not look like a high rate."""
    now, calls = 0.0, 0
    rate = Rate(lambda: calls, clock=lambda: now)
    rate.read()
    assert rate.per_minute == 0
    now, calls = 5.0, 100
    rate.read()
    assert rate.per_minute == 400
    now, calls = 30.0, 600
    rate.read()
    assert rate.per_minute == 1200
    now = 89.0
    rate.read()
    now = 150.0
    rate.read()
    assert rate.per_minute == 0
