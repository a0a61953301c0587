"""The URLs that keys may be read from."""

import ipaddress
from urllib.parse import urlsplit


def check(url: str) -> str:
    """Returns the URL unchanged. Raises ValueError if keys may not be read from it."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r:.200} is not an https URL: write one such as https://issuer.example.com")
    if parts.scheme == "http" and not _is_here(host):
        raise ValueError(
            f"{url!r:.200} is not an https URL: keys are read over plain http only from this machine, because others "
            "could replace them on their way"
        )
    return url


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
