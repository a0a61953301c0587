"""The path of an inference call: from its model id to a copy, and the answer back.

`dispatch` takes every call. `routes` (`fieldpath`, `extensions`) finds its model, `unary` or `streams` carries the call
to a copy that `forwarder` picks, and the answer comes back through `replies`; `answers` builds the errors that the
router itself returns. If a try gets no answer, `attempts` decides what happens next, by the rule in `placement.retry`.
`shares`, `deaths` and `meter` count a worker's calls.
"""
