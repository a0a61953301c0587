"""Loads on demand: from "no copy that can be called" to a copy.

`placement.coldstart` decides each step. Callers wait in `coldstart`, which carries instructions out and feeds events
back. `finder` answers its questions: the record, the view, an agent's answer. `choosing` picks the pod for a load, for
status and `explain` too. `asking` and `agents` reach the agents.
"""
