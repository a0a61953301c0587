"""The guard that a router's settings describe."""

from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Authenticator
from router.access.guard import Guard
from router.settings import RouterSettings


def guard(settings: RouterSettings, authority: Authority) -> Guard:
    """Returns the guard of one process. Raises ValueError for a file that cannot be used."""
    others: list[Authenticator] = []
    return Guard(authority, mode=settings.auth, admin=AdminKeys(settings.admin_key_file), others=others)
