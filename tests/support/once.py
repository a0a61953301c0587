"""A retry policy without retries."""

from puller.retry import RetryPolicy

ONCE = RetryPolicy(attempts=1)
"""One attempt."""
