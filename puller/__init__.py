"""From where a model is stored to the disk of the pod that loads it.

- `source` says what a registration's path and key name; `errors` what can go wrong, and what has to happen then.
- `provider` is the seam: one provider a kind of store, and what identifies content. `local`, `http`, `huggingface` and
  `objects` are those that there are.
- `addresses` decides which network addresses may be connected to; `http_client` and, for obstore, `tunnel` hold to it.
  `proxies` are the operator's.
- `shares`, `limits` and `floor` bound what stores take from each other.
- `disk` is the pod's own directory, `cache` the whole files in it, each known by its SHA-256.
- `puller` is the front that the agent uses.

Nothing here knows the mesh. What is loaded, and when files may go, is the agent's business.
"""
