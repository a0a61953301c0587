"""Loads on demand: from "no copy that can be called" to a copy.

What is done is decided in `placement.coldstart`. `coldstart` is what callers wait at: it carries instructions out and
feeds events back. `finder` finds out what is asked: the record, the view, an agent's answer. `choosing` says where a
load would go now; status and `explain` tell the same. `asking` and `agents` reach the agents.
"""
