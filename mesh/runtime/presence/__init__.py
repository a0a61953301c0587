"""The pod as the mesh sees it: its lease, its keys, its claims on copies, and the fence that depends on them."""
