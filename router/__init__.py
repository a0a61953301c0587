"""The router: it takes calls from clients, picks a pod for each, forwards the call, requests loads, and keeps the
registry."""
