"""The relay: the process that answers on a pod's data port for a foreign model server.

For the agent it is a model server, with the same SPI on a unix socket and the same metadata. For routers it is the data
port: it checks copies, obeys the fence and writes the use board. For the foreign server it is a client that speaks real
gRPC. It is a separate process, so that neither the agent's lease nor its fence waits while calls are passed on.

- `process` assembles the parts, `settings` parses the command line;
- `spi` answers the agent by calling the server's own SPI; `table` has the copies, and `journal` what the next relay
  must know about them, so that the death of a relay loses no model;
- `control` is the contract of how a server is managed, and manages those that speak the SPI; `adapters` manages others;
- `calls` passes calls on: `methods` knows which are allowed and where an id belongs, `splice` puts it there, `metadata`
  converts headers, `verdicts` distinguishes a lost model from a model's own error;
- `egress` is the contract of how a call reaches the server; `envoyegress` does it through Envoy, and `grpcegress` with
  `grpc.aio`;
- `link` is the connection to the server, and notices if the server has ended, hangs, or was restarted; `handshake`
  distinguishes a busy server from a stopped one.
"""
