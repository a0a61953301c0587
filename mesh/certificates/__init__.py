"""Certificates for TLS inside a mesh: how they are issued, renewed, and stored for the processes that present them.

`issuing` signs, `renewal` decides what is due, `keeping` applies it to a store, and `folder` and `secret` are the
stores.
"""

from mesh.certificates.issuing import Wanted
from mesh.certificates.renewal import Foreign, Renewal, renew

__all__ = ["Foreign", "Renewal", "Wanted", "renew"]
