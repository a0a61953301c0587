"""Pulling of models: from their stores to the disk of the pod that loads them.

- `source` resolves a registration's path and key; `errors` lists what can go wrong, and what must happen before a
  retry.
- `provider` is the interface: one provider for each kind of store, and what identifies content. `local`, `http`,
  `huggingface` and `objects` are the built-in ones.
- `addresses` decides which network addresses may be connected to; `http_client` and, for obstore, `tunnel` enforce it.
  `proxies` reads the operator's proxies.
- `shares`, `limits` and `floor` bound what stores take from each other.
- `disk` is the pod's own directory, `cache` the whole files in it, each known by its SHA-256.
- `puller` is the front that the agent uses.

This package does not know the mesh. The agent decides what is loaded, and when files may be removed.
"""
