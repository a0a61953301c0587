"""An HTTP/2 client for calls of one message: one connection, gRPC as its servers speak it (RFC 9113, RFC 7541).

The relay makes direct calls to a foreign server through it. It implements only a part of HTTP/2, because all other
calls go through the egress: no TLS, no push, no priorities, and only requests of one message. It asks the server not to
compress headers with a dynamic table. So a block of headers always means the same, and its meaning is cached under its
bytes, as `heads` does for HTTP/1.1.

`frames` reads and writes frames, `blocks` reads and writes headers, `stream` is one call and judges its reply, and
`connection` carries the streams and does flow control.
"""
