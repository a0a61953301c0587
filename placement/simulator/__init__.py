"""The mesh in miniature: a trace of requests goes through the very decisions that the processes make.

`traces` makes requests, `fleet` the models, `cluster` has the router's view and the pods' caches, `optimum` knows the
future, and `run` drives and measures. Times are whole milliseconds from the trace's beginning. Nothing here reads files
or clocks; equal inputs give equal results, to the last eviction.
"""
