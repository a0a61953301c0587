"""From where a model is stored to the disk of the pod that loads it.

- `source` says what a registration's path and key name; `errors` what can go wrong.
- `provider` is the seam: one provider a kind of store. `local` and `http` are the first two.
- `addresses` decides which network addresses may be connected to.
- `disk` is the pod's own directory: temporary names, renames, safe names, free space.
- `puller` is the front that the agent uses.

Nothing here knows the mesh. What is loaded, and when files may go, is the agent's business.
"""
