"""The agent of a runtime pod, which alone decides what is in the pod's memory.

`lifecycle` starts and ends it, `assembly` makes its parts. It carries no inference calls: they go directly to the
data port.
"""
