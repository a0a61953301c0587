"""The pod in etcd: its lease, its keys, its claims on copies, and the fence that depends on these."""
