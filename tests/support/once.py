"""Retries for tests that want none."""

from puller.retry import RetryPolicy

ONCE = RetryPolicy(attempts=1)
"""One attempt."""
