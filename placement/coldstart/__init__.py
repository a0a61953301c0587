"""A cold start as a state machine: events in, instructions out.

A call that finds no copy *joins* the model's *flight*. The flight reads the record, looks at the view, has a pod
chosen, asks that pod's agent, and acts on the answers until there is a copy, or a reason why there is none. All calls
that wait for the model share the flight; each has its own deadline and may leave. The flight continues without them,
because the next caller will want the model too.

The machine does no I/O, reads no clock and has no tasks. Its carrier feeds it one event at a time, with the time, and
carries out the instructions that it gets back; the results are the next events. The design follows the worker state
machine of Dask distributed: every instruction names the event that caused it, and an impossible event raises an error
that tells the flight's story.

- `flight`: one model's way to a copy, and the table of its phases; open this first.
- `events` and `instructions`: everything that goes in and comes out.
- `machine`: the one entry, `Machine.handle`, and the handling of waiters, time and changes of the view.
- `answers`: the handling of each answer to an instruction. `choosing`: the handling of a choice of a pod.
- `flights`: the steps that these take: read, look, ask, wait, end.
- `waiters`: the waiters, with their limits and deadlines. `alarms`: the times at which the machine needs an event.
- `problems`: the reasons why a waiter gets no copy, as data. `rules`: limits and times. `story`: a flight's history.
"""
