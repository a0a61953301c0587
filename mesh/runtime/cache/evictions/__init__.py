"""The way of copies out of memory. The modules, in the order in which they are used:

- `victims`: the copies to evict for a load, by `placement.room`
- `memory`: the copies to evict because the server takes more memory than it may
- `eviction`: carries out both kinds of evictions, counts them, keeps the reasons
- `unloads`: the steps of unloading one copy, until nothing of it is left
- `capacity`: how much memory models may take in total
"""
