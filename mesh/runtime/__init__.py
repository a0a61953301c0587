"""One runtime pod: an agent and the model server that it starts.

Its packages, each of which imports only those below it (a contract of import-linter):

    agent/         assembly, start, description and end of one pod; the service that routers call
    cache/         what is in the model server's memory: `loads` bring models in, `evictions` copies out, by the `books`
    presence/      this pod in etcd: its name, its lease, the keys under it, the right to load, the fence
    blame/         what the pod writes into models' records, above all which models may have killed a server
    servers/       the model server as its agent sees it: a child process, and the SPI that it speaks
    server/        the ONNX model server, a separate process
    sharedmemory/  the use board, shared by the agent and the process that answers on the data port
    turns          the order of waiting loads, for both processes
    duties         the long-lived tasks of both

Read first: `agent.assembly` (the parts), `cache.assembly` and then `cache.loads.flights` (what happens when a router
asks for a model).

Only the agent decides what is in its pod's memory. It carries no inference calls: routers send those directly to the
data port.
"""
