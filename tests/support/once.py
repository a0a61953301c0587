"""Retries for tests that want none."""

from puller.retry import Policy

ONCE = Policy(attempts=1)
"""One attempt."""
