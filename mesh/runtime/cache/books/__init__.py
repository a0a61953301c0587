"""The contents of the pod's memory, and figures about them.

- `entries`: one model in this pod
- `ledger`: bytes by model, reserved and in use, and the order in which copies would be evicted
- `space`: the event that memory has become free
- `activity`: the call rate of each copy
- `rate`: the call rate of the pod
- `demand`: the memory that the models in use need, in pods
- `decisions`: the latest decisions with their reasons
- `meters`: the pod's metrics
"""
