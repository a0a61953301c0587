"""Envoy as a child process: its configuration, its starts and restarts.

- `minder` runs the Envoy at the edge of a router pod, which terminates TLS, HTTP/2 and HTTP/1.1. `config` makes its
  configuration, and `certificates` follows the files of its certificate.
- `egress` runs and configures the Envoy between a relay and a foreign model server.
- `child` is one Envoy process.
"""
