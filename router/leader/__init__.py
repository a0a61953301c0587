"""The leader's slow loops, which plan the number of copies of each model and replace copies of draining and lost pods.

One router of the mesh runs them, elected through etcd (`election`). `observing` gathers the state of the mesh, `rounds`
passes it to `placement`, which makes plans, and `carrying` has agents carry out the plans (`orders`). Meanwhile
`handover` empties draining pods, `reloading` moves copies to new content, and `transitions` moves vmodels to their
targets, whose copies `moving` loads. `warming` loads recently used models, which `recency` remembers, into free memory.
None of this is on the path of a call, so without a leader only these duties wait.
Two leaders at the same moment do no harm: both request the same actions, and an agent that has already carried out an
action answers immediately.

The leader also closes lives for the fence, in `router.fencing.closing`.
"""
