"""What is in the pod's memory, and what is counted of it:

- `entries`: one model in this pod
- `ledger`: bytes by model, promised and in use, and the order in which copies would go
- `space`: the news that memory has become free
- `activity`: how much each copy is called
- `rate`: how much the pod is called
- `demand`: how much memory the models in use want, in pods
- `decisions`: the latest decisions with their reasons
- `meters`: the pod's metrics
"""
