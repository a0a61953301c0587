"""The slow loops: the number of copies of each model, and the copies of pods that leave or have disappeared.

One router of the mesh runs them, chosen through etcd (`election`). `observing` gathers the state of the mesh, `rounds`
has `placement` make plans of it, `carrying` has agents carry them out (`orders`). Meanwhile `handover` empties pods
that leave, and `reloading` moves copies to new content. None of this is on the path of a call; without a leader for a
while, only these duties wait. Two leaders for a moment do no harm: both request the same, and an agent that has done it
already answers at once.

A leader also closes lives for the fence, in `router.fencing.closing`.
"""
