"""Loads on demand, for models without a copy that can be called.

`placement.coldstart` decides each step. Callers wait in `coldstart`, which carries out the instructions and returns
events. `finder` answers requests for the record, the view, or an agent's answer. `choosing` picks the pod for a load;
status and `explain` use it too. `asking` and `agents` send requests to the agents.
"""
