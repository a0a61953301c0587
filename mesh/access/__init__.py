"""Pure decisions about who may do what: no I/O, no clock.

A `Principal` is a caller whose identity was proven, for example by an API key. A `Grant` gives principals and groups a
role, for all names that match its patterns. `decide` returns whether a principal may do something with a name, and why.
Nothing is allowed without a grant for it.

This package does not verify credentials, and does not know where grants come from: routers do (`router.access`).
"""
