"""The number of examples of a property test, in proportion to the profile's.

A test that needs more or fewer examples than others says so for a profile of 100 examples, the default of Hypothesis.
`make test` tries fewer, `make test-long` more (`tests/conftest.py`).
"""

from hypothesis import settings


def examples(count: int) -> int:
    """Returns the number of examples for a test that would try `count` of them in a profile of 100."""
    return max(1, count * settings().max_examples // 100)
