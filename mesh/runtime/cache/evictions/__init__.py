"""Copies out of memory, in this order:

- `victims`: the copies to evict for a load, by `placement.room`
- `memory`: the copies to evict because the server takes more than it may
- `eviction`: carries both out, counts them, keeps the reasons
- `unloads`: one copy out of memory, until nothing of it is left
- `capacity`: how much memory models may take in total
"""
