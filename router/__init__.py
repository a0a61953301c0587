"""The router, which clients call: picks a pod for each call, carries the call there, requests loads, keeps the
registry."""
