"""Envoy as a child process: its configuration and life cycle.

It terminates HTTP/2, TLS and HTTP/1.1 at the edge of a router pod.
"""
