"""A mesh in miniature: a trace of requests runs through the decision code of the real processes.

`traces` generates requests, `fleet` the models; `cluster` has the router's view and the pods' caches, `optimum` knows
the future, and `run` drives and measures. Times are integer milliseconds since the beginning of the trace. Nothing here
reads files or clocks; equal inputs give equal results, to the last eviction.
"""
