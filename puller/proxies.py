"""The operator's own proxies, from the usual environment variables.

These are `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`; their lower-case forms take precedence. `NO_PROXY` is
a list of hosts, domains (with or without a leading dot, meaning everything below them), addresses and networks
(`10.0.0.0/8`), any of them with a port; `*` means everything. Loopback addresses are never requested through a proxy.

Only `http:` proxies are supported. The scheme is that of the proxy itself; the TLS connection of an `https:` URL is
with the store.
"""

import contextlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass

from yarl import URL

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxies:
    """The choice of a proxy for each URL."""

    http: URL | None = None
    https: URL | None = None
    bypassed: tuple[str, ...] = ()

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Proxies":
        """Reads the environment. Raises ValueError for an invalid proxy; the text names the variable."""
        bypassed = environment.get("no_proxy", environment.get("NO_PROXY", ""))
        return cls(
            _proxy(environment, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"),
            _proxy(environment, "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
            tuple(part.lower() for part in bypassed.replace(",", " ").split()),
        )

    def of_url(self, scheme: str, host: str, port: int | None = None) -> URL | None:
        """Returns the proxy for a URL of that scheme and host, or None if the URL is requested directly."""
        proxy = self.https if scheme == "https" else self.http
        port = port or _PORTS.get(scheme, 0)
        return proxy if proxy is not None and not self._direct(host.lower().rstrip("."), port) else None

    def _direct(self, host: str, port: int) -> bool:
        address = _address(host)
        if host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback):
            return True
        return any(_matches(part, host, address, port) for part in self.bypassed)


DIRECT = Proxies()
"""The setting that uses no proxy for any URL."""


def _proxy(environment: Mapping[str, str], *names: str) -> URL | None:
    for name in names:
        text = environment.get(name, "").strip()
        if not text:
            continue
        try:
            url = URL(text if "://" in text else f"http://{text}")
            valid = url.scheme == "http" and bool(url.host)
        except ValueError:
            valid = False
        if not valid:
            # The value is not shown, as it may contain a password.
            raise ValueError(f"{name} is not the URL of an http proxy, such as http://proxy.example.com:3128")
        return url
    return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _matches(part: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    if part == "*":
        return True
    if address is not None:
        with contextlib.suppress(ValueError):
            return address in ipaddress.ip_network(part.strip("[]"), strict=False)
    name, _, wanted = part.rpartition(":")
    if name and wanted.isdigit() and (":" not in name or name.endswith("]")):
        return int(wanted) == port and _matches(name.strip("[]"), host, address, port)
    name = part.lstrip("*").lstrip(".")
    return address is None and bool(name) and (host == name or host.endswith(f".{name}"))
