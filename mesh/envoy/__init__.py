"""Envoy as a child process: its configurations and life cycles.

- `minder` keeps the Envoy at the edge of a router pod, which terminates TLS, HTTP/2 and HTTP/1.1; `config` is its
  configuration, and `certificates` follows the files of its certificate;
- `egress` keeps the Envoy between a relay and a foreign model server, and has its configuration;
- `child` is one Envoy process.
"""
