"""gRPC carried over HTTP/1.1: the data path inside the mesh, both ends of it.

Measured, a `grpc.aio` server costs about 200 us of CPU a call and a protocol class over httptools 10 us. So Envoy ends
HTTP/2 at the edge, and behind it gRPC travels as HTTP/1.1: `POST /package.Service/Method`, metadata as headers, the
usual 5-byte prefix before each message, status and trailing metadata as HTTP trailers.

`call` says what a handler sees, `server` and `client` are the two ends, `framing` and `metadata` what both need.
This package knows nothing of models, pods or placement.
"""
