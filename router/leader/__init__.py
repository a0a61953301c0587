"""The slow loops: how many copies each model has, what happens to those of a pod that leaves or has gone.

One router of the mesh runs them, chosen through etcd (`election`). `observing` gathers how the mesh is, `rounds` has
`placement` make plans of that, `carrying` has agents carry them out (`orders`). Beside that, `handover` empties pods
that leave, and `reloading` moves copies to new content. Nothing of it is on the path of a call; without a leader for a
while, only these things wait. Two leaders for a moment do no harm: both ask for the same, and an agent that has done it
already is done at once.

A leader also ends what the fence waits for: that is `router.fencing.closing`'s.
"""
