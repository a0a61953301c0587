"""The router: it takes calls from clients, picks a pod for each call, forwards it, requests loads, and keeps the
registry."""
