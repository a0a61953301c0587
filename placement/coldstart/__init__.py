"""A cold start as a machine: events in, instructions out.

A call that finds no copy *joins* the model's *flight*. The flight reads the record, looks at the view, has a pod
chosen, asks that pod's agent, and goes on with what the agent answers until there is a copy or a reason why there is
none. All who wait for the model share the flight; each has its own deadline and may leave, and the flight goes on
without them, because the next caller will want the model too.

The machine does no I/O, reads no clock and has no tasks. Its carrier feeds it one event at a time, each with the time,
and carries out the instructions it gets back; what it learns by that is the next event. The design follows the worker
state machine of Dask distributed: every instruction names the event that caused it, and an event that cannot happen
raises an error that tells the flight's story.

- `flight`: one model's way to a copy, and the table of its phases; open this first.
- `events` and `instructions`: everything that goes in and comes out.
- `machine`: the one entry, `Machine.handle`, and what follows from waiters, time and changes of the view.
- `answers`: what follows from each answer to an instruction. `choosing`: what follows from a choice of a pod.
- `flights`: the steps that both take: read, look, ask, wait, end.
- `waiters`: who waits, within which bounds, and until when. `alarms`: when the machine wants to be told the time.
- `problems`: why a waiter gets no copy, as data. `rules`: the numbers. `story`: a flight's history.
"""
