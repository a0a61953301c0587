"""Loads on demand: from "no copy that can be called" to a copy.

`placement.coldstart` decides each step. Callers wait in `coldstart`, which carries out instructions and feeds events
back. `finder` answers its requests: for the record, the view, an agent's answer. `choosing` picks the pod for a load,
and for status and `explain`. `asking` and `agents` send requests to the agents.
"""
