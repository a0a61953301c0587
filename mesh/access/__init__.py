"""Pure decisions about permissions: no I/O, no clock.

A `Principal` is a caller whose identity was proven, by its key or otherwise. A `Grant` gives a role on patterns of
names to principals and groups. `decide` returns whether a principal may do something with a name, and why. Nothing is
allowed without a grant for it.

This package does not verify credentials, and does not know where grants come from: routers do (`router.access`).
"""
