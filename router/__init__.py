"""The router: what clients talk to. Picks a pod for each call, carries it there, asks for loads, keeps the registry."""
