"""The agent of a runtime pod. Only the agent decides which models are in the pod's memory.

`lifecycle` starts and ends the agent, `assembly` makes its parts. The agent carries no inference calls: routers send
these directly to the data port.
"""
