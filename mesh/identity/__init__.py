"""Mutual TLS inside the mesh: the certificate that a process shows to others, and how it recognizes theirs.

`credentials` reads the files and proves them, `identity` follows them as they change, `rpc` hands them to gRPC.
"""

from mesh.identity.credentials import NAME, IdentityError
from mesh.identity.identity import Identity

__all__ = ["NAME", "Identity", "IdentityError"]
