"""The router's side of the fence, which keeps pods that are cut off from answering for what is gone.

`verify` finds out for a call what its pod must know before it may answer; `prober` whether suspect pods are still
there; `tombstones` who may still answer for a model that was unregistered, and `closing`, while this router leads, when
a pod that is cut off is over. What stands in etcd of all that is `mesh.schema.lives`, the rules are `placement.fence`.
"""
