"""The edge without Envoy: `grpc.aio` in each worker. With Envoy, the edge is `mesh.envoy` in front of `mesh.wire`."""
