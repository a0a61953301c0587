"""Pulling models from their stores to the disk of the pod that loads them.

- `source` resolves a registration's path and key; `errors` lists the kinds of failure, and what must happen before a
  retry.
- `provider` is the interface of a kind of store, and defines what identifies content. `local`, `http`, `huggingface`
  and `objects` are the built-in providers.
- `addresses` decides which network addresses a pull may connect to; `http_client` and, for obstore, `tunnel` enforce
  that. `proxies` reads the operator's proxies.
- `shares`, `limits` and `floor` keep stores from taking bandwidth and connections from each other.
- `disk` is the pod's own directory, `cache` the complete files in it, each known by its SHA-256.
- `puller` is the entry point that the agent uses.

This package does not depend on the mesh. The agent decides what is loaded, and when files may be removed.
"""
