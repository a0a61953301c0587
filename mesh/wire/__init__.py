"""gRPC carried over HTTP/1.1: both ends of the data path inside the mesh.

Measured, a call costs a `grpc.aio` server about 200 us of CPU, and a protocol class over httptools 10 us. So Envoy
terminates HTTP/2 at the edge, and behind it gRPC travels as HTTP/1.1: `POST /package.Service/Method`, metadata as
headers, the usual 5-byte prefix before each message, status and trailing metadata as HTTP trailers.

`call` defines what a handler sees, `server` and `client` are the two ends, and both use `framing` and `metadata`. Apart
from `headers`, `requestdigest` and `localcall`, this package knows nothing about models, pods or placement.
"""
