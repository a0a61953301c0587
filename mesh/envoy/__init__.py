"""Envoy as a child process: its configuration and life cycle.

Envoy terminates TLS, HTTP/2 and HTTP/1.1 at the edge of a router pod.
"""
