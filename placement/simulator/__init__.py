"""A simulated mesh: a trace of requests runs through the decision code of the real processes.

`traces` generates requests, and `fleet` the models. `cluster` has the router's view and the pods' caches, `optimum`
computes the best possible hit rate, and `run` drives a simulation and measures it. Times are integer milliseconds since
the beginning of the trace. Nothing here reads files or clocks, so equal inputs give equal results, to the last
eviction.
"""
