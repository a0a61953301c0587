"""The decisions of Mesh as pure functions: each takes facts and returns a decision with its reason.

The functions use no clock, I/O or asyncio; ages and times are arguments, in milliseconds. The router, the agent, the
simulator and `mesh explain` can therefore all run the same code, and a test takes microseconds. The caller carries out
the decision, and knows when to ask again.

- `pod`: a pod as a decision sees it; `debits` corrects its figures by the loads that the observer has sent there since.
- `choice`: which pod loads a model. `balance`: which copy answers a call. `room`: which copies make way for a load.
- `failures`: the pods that must not try a failed load again yet. `coldstart`: the state machine of a cold start.
- `rendezvous` and `words`: the deterministic draw and the wording that these modules share.
"""
