"""The relay: the process that answers on a pod's data port beside a model server that is not ours.

To the agent it is a model server: the same SPI on a unix socket, with the same metadata. To routers it is the data
port: it checks copies, obeys the fence and writes the use board. To the foreign server it is a client that speaks real
gRPC. It is a process of its own, so that neither the agent's lease nor its fence wait for calls being carried.

- `process` assembles the parts, `settings` parses the command line;
- `spi` answers the agent, by the server's own SPI; `table` has the copies, and `journal` what the next relay must know
  about them: a relay that dies takes no model with it;
- `calls` carries calls: `methods` knows which are allowed and where an id belongs, `splice` puts it there, `metadata`
  converts headers, `verdicts` tells a lost model from a model's own error;
- `link` is the connection to the server: it notices that the server has gone, hangs, or was restarted, `handshake`
  tells a busy server from a frozen one.
"""
