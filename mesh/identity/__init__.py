"""Mutual TLS inside the mesh: what a process shows to the mesh's other processes, and what it knows them by.

`credentials` reads the files and proves them, `identity` follows them as they change, `rpc` hands them to gRPC.
"""

from mesh.identity.credentials import NAME, IdentityError
from mesh.identity.identity import Identity

__all__ = ["NAME", "Identity", "IdentityError"]
