"""The path of an inference call: from its model id to a copy, and the answer back.

`dispatch` receives every call. `routes` (with `fieldpath` and `extensions`) reads the name that the call asks for,
`aliases` finds the model behind the name, and `unary` or `streams` carries the call to a copy that `forwarder` picks.
`replies` returns the answer, and `answers` builds the errors that the router itself returns. If an attempt gets no
answer, `attempts` decides what happens next, by the rule in `placement.retry`. `several` carries calls of several
models, `diversion` chooses another model of an alias, and `mirror` calls shadows. `shares`, `deaths`, `meter` and
`aliasmeter` count a worker's calls.
"""
