"""One runtime pod: the agent, and the model server that it starts beside itself.

Its rooms, each of which imports only what stands below it (a contract of import-linter):

    agent/         one pod, put together, started, described and taken down; what routers ask of it
    cache/         what is in the model server's memory: `loads` bring models in, `evictions` copies out, by the `books`
    presence/      this pod in etcd: its name, its lease, the keys under it, the right to load, the fence
    blame/         what is written into models' records, above all who may have cost a server
    servers/       the model server as its agent sees it: a child process, and the SPI that it speaks
    server/        the ONNX model server, a process of its own
    sharedmemory/  the use board, which the agent and whoever answers on the data port share
    turns          whose load is next, for both of them
    duties         the long-lived tasks of both

Read first: `agent.assembly` (which parts there are), `cache.assembly` and then `cache.loads.flights` (what happens when
a router asks for a model).

The agent alone decides what is in its pod's memory. It carries no inference: that goes to the data port directly.
"""
