"""The router's side of the fence, which keeps pods that are cut off from answering for deleted registrations.

`verify` reads a model's record for calls whose pod must not answer before it is read. `prober` checks whether suspect
pods still exist. `withdrawal` removes registrations and has their copies unloaded. `tombstones` finds the pods that may
still answer for an unregistered model. While this router leads, `closing` closes the lives of pods that have ended.
`mesh.schema.lives` defines the keys in etcd, `placement.fence` the rules.
"""
