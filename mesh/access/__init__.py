"""The pure decision about who may do what. It does no I/O and reads no clock.

A `Principal` is a caller whose identity was proven, by its key or otherwise. A `Grant` gives a role over patterns of
names to principals and groups. `decide` answers whether a principal may do something with a name, and why. Without a
grant that says so, nothing is allowed.

This package does not verify credentials, and does not know where grants come from: routers do (`router.access`).
"""
