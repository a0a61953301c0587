"""The relay: the process that answers on a pod's data port for a foreign model server.

For the agent it is a model server, with the same SPI on a unix socket and the same metadata. For routers it is the data
port: it checks copies, obeys the fence and writes the use board. For the foreign server it is a client that speaks real
gRPC. The relay is a separate process, so that the agent's lease and fence never wait for calls.

- `process` assembles the parts, `settings` parses the command line;
- `spi` answers the agent by managing the server; `table` has the copies, and `journal` records for the next relay what
  it must know about them, so that no model is lost when a relay dies;
- `control` defines the interface by which a server is managed, and manages servers that speak the SPI; `adapters`
  manages other servers; `reported` reads what a server reports about its device;
- `calls` forwards calls: `carried` has the state of one call, `methods` says which methods are allowed and where their
  messages have the model's id, `splice` writes the id there, `metadata` converts headers, and `verdicts` distinguishes
  a lost model from a model's own error;
- `egress` defines the interface by which calls reach the server; `envoyegress` implements it with Envoy, `grpcegress`
  with `grpc.aio`, and `directegress` with an HTTP/2 connection of its own for most calls of one message; `translating`
  translates calls for servers that do not answer V2;
- `link` is the connection to the server, and notices if the server has ended, hangs, or was restarted; `handshake`
  distinguishes a busy server from a stopped one; `silence` notices if a prediction blocks the server's event loop.
"""
