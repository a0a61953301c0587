"""The router's side of the fence, which keeps pods that are cut off from answering for deleted registrations.

`verify` reads, for a call, what its pod must know before it may answer; `prober` asks whether suspect pods still
exist; `withdrawal` removes registrations and has their copies unloaded; `tombstones` finds the pods that may still
answer for an unregistered model; and `closing`, while this router leads, closes the lives of pods that have ended.
The keys in etcd are `mesh.schema.lives`, the rules `placement.fence`.
"""
