"""One runtime pod: an agent and the model server that it starts.

Its packages, each of which imports only those below it (a contract of import-linter):

    agent/         assembly, start, description and end of one pod; the service that routers call
    cache/         the contents of the model server's memory: `loads` and `evictions` change it, `books` count it
    presence/      this pod in etcd: its name, its lease, the keys under it, the right to load, the fence
    blame/         the pod's writes to models' records, for example about models that may have killed a server
    servers/       the model server for its agent: a child process, and the SPI by which it is called
    server/        the ONNX model server, a separate process
    relay/         the relay to any other model server, a separate process
    port/          the rules of the data port, which the ONNX server and the relay share
    sharedmemory/  the use board, shared by the agent and the process that answers on the data port
    turns          the order of waiting loads, for the agent and the ONNX server
    duties         the long-lived tasks of the agent, the ONNX server and the relay

Read first: `agent.assembly` (the parts), `cache.assembly` and then `cache.loads.flights` (what happens when a router
asks for a model).

Only the agent decides which models are in its pod's memory. It carries no inference calls: routers send these directly
to the data port.
"""
