"""The guard that a router's settings describe."""

from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Authenticator
from router.access.guard import OFF, Guard
from router.settings import RouterSettings


def guard(settings: RouterSettings, authority: Authority) -> Guard:
    """Returns the guard of one process. Raises ValueError for a file that cannot be used."""
    others: list[Authenticator] = []
    if settings.tls_client_ca and settings.auth != OFF:  # then the edge is an Envoy, which verifies the certificates
        from router.access.clientcerts import ClientCertificates  # cryptography takes memory

        others.append(ClientCertificates())
    return Guard(authority, mode=settings.auth, admin=AdminKeys(settings.admin_key_file), others=others)
