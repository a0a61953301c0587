"""The agent of a runtime pod, which alone decides what is in the pod's memory.

`lifecycle` starts and ends the agent, `assembly` makes its parts. The agent carries no inference calls: routers send
those directly to the data port.
"""
