"""The network addresses that a pull may connect to.

A person who may register a model can name URLs, which the pod then opens from inside the cluster. By default, only
addresses of the public internet are allowed. `allow_private` adds loopback and private networks, which are needed if
the store is in the cluster; link-local addresses, at which clouds serve credentials, need `allow_link_local`.

The check applies to the address that a socket is about to connect to, not to the name, which may resolve to another
address next time. IPv6 forms that carry an IPv4 address count as that address.
"""

import ipaddress

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_BY_OPTION = ("a loopback address", "a private address")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def refusal(host: str, *, allow_private: bool, allow_link_local: bool) -> str | None:
    """Returns why this address (text, perhaps with a scope: `fe80::1%eth0`) may not be connected to; None if it may."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "not an address"
    for meant in _meant(address):
        if meant.is_link_local:
            if not allow_link_local:
                return "a link-local address"
        elif meant.is_unspecified or meant.is_multicast or _broadcast(meant):
            return "not the address of one host"
        elif not allow_private and (not meant.is_global or _site_local(meant)):
            return _BY_OPTION[0] if meant.is_loopback else _BY_OPTION[1]
    return None


def told(host: str, why: str) -> str:
    """Returns a refusal as a clause that names the address and, if there is one, the option that would allow it."""
    if why not in _BY_OPTION:
        return f"{host} is {why}" + (", which no pod may connect to" if why == "a link-local address" else "")
    return f"{host} is {why}, which the operator does not allow (--http-allow-private)"


def _meant(address: _Address) -> list[_Address]:
    """Returns the address and every IPv4 address that it contains."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inner: list[_Address] = []
    if address.ipv4_mapped is not None:
        # Only the inner address is returned: Python versions classify the wrapper differently.
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        inner.append(address.sixtofour)
    if address.teredo is not None:
        inner.extend(address.teredo)
    if address in _NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        return inner
    if not int(address) >> 32 and int(address) > 1:
        return [ipaddress.IPv4Address(int(address))]  # "IPv4-compatible", long deprecated
    return [address, *inner]


def _site_local(address: _Address) -> bool:
    # Deprecated but still private, although `is_global` is True for it.
    return isinstance(address, ipaddress.IPv6Address) and address.is_site_local


def _broadcast(address: _Address) -> bool:
    return str(address) == "255.255.255.255"
