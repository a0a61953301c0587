"""The way of an inference call: from its model id to a copy, and the answer back.

`dispatch` takes every call. `routes` (`fieldpath`, `extensions`) finds its model, `unary` or `streams` carries it to a
copy that `forwarder` picks, and what comes back goes through `replies`; `answers` are failures of our own. What follows
from a try that brought no answer is `attempts`', by the rule in `placement.retry`. `shares`, `deaths` and `meter` keep
count for the calls of a worker.
"""
