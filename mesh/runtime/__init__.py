"""One runtime pod: the agent, and the model server that it starts beside itself.

    settings      what the agent is told
    agent         starts the parts, knows how the pod is, drains it
    control       what routers ask: load, unload, describe
    loads         which loads begin, are joined, end early
    loading       the steps of one load
    outcomes      what is asked of loads, and what may come of it
    unloads       one copy out of memory, and nothing of it left
    earlier       who was at work when an earlier life of this pod was killed whole
    ledger        what is in memory, and who makes way (decided by `placement.room`)
    claims        the right to load, one etcd transaction
    presence      the lease, and the keys under it
    place         the pod's name, held by one incarnation at a time
    figures       what the pod publishes of itself, and when
    history       what is written into models' records
    serverprocess the model server as a child: started, watched, started again
    suspects      what was going on in it when it ended (who may have caused that: `placement.suspects`)
    relief        its replacement when it has lost threads
    tally         how often the kernel has killed for memory
    spi           the client of mmesh.ModelRuntime
    memory        the server's resident memory against what is promised
    housekeeping  the periodic check against the registry
    board         the use board, shared with whoever answers on the data port
    atwork        a part of it: what each of the server's threads is doing
    server/       the ONNX model server, a process of its own

The agent alone decides what is in its pod's memory. It carries no inference: that goes to the data port directly.
"""
