"""The leader's slow loops: the number of copies of each model, and the copies of draining and lost pods.

One router of the mesh runs them, chosen through etcd (`election`). `observing` gathers the state of the mesh, `rounds`
has `placement` make plans from it, and `carrying` has agents carry them out (`orders`). Meanwhile `handover` empties
draining pods, `reloading` moves copies to new content, and `transitions` moves vmodels to their targets, whose copies
`moving` has loaded. None of this is on the path of a call: while there is no leader, only these duties wait. Two
leaders for a moment do no harm: both request the same, and an agent that has done it already answers at once.

A leader also closes lives for the fence, in `router.fencing.closing`.
"""
