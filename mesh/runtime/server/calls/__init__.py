"""Calls, from the data port to the answer: short ones in the event loop, long ones in threads."""
