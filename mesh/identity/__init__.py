"""Mutual TLS inside the mesh: the certificate that a process presents to others, and the check of their certificates.

`credentials` reads and checks the files, `identity` follows their changes, `rpc` passes them to gRPC.
"""

from mesh.identity.credentials import NAME, IdentityError
from mesh.identity.identity import Identity

__all__ = ["NAME", "Identity", "IdentityError"]
