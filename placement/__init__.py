"""The decisions of Mesh, pure: what is known goes in, a decision with its reason comes out.

No clock, no I/O, no asyncio: ages and times are arguments, in milliseconds, so that the router, the agent, the
simulator and `mesh explain` run the very same code, and a test of it takes microseconds. Carrying a decision out
belongs to the caller, and so does knowing when to ask again.

- `pod`: a pod as a decision sees it; `debits` corrects it by what its observer did since it was published.
- `choice`: which pod loads a model. `balance`: which copy answers a call. `room`: which copies make way for a load.
- `failures`: where a failed load is not tried again yet. `coldstart`: from no copy to a copy, as a machine.
- `rendezvous` and `words`: the stable draw and the plain sentences that they share.
"""
