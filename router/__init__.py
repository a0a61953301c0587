"""The router: it accepts calls from clients, picks a pod for each call, forwards the call, requests loads, and keeps
the registry."""
