"""The router, which clients call: it picks a pod for each call, carries the call there, requests loads, and keeps the
registry."""
