"""Calls, from the data port to the answer. Short calls run in the event loop, long calls in threads."""
