"""An HTTP/2 client for calls of one message: one connection, gRPC as its servers speak it (RFC 9113, RFC 7541).

The relay calls a foreign server through it, without a program between them. It is smaller than HTTP/2, because it
leaves the rest to another way to the server: it needs no TLS, no push and no priorities, it sends requests of one
message only, and it asks the server not to compress headers with a dynamic table. So a block of headers means the same
wherever it arrives, and its meaning is cached under its bytes, as `heads` does for HTTP/1.1.

`frames` reads and writes frames, `blocks` reads and writes headers, `stream` is one call and judges its reply, and
`connection` carries the streams, and keeps the accounts of flow control.
"""
