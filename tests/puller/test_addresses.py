"""The addresses to which connections are allowed, in every spelling."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.addresses import refusal


def allowed(host: str, *, private: bool = False, link_local: bool = False) -> bool:
    return refusal(host, allow_private=private, allow_link_local=link_local) is None


@pytest.mark.parametrize("host", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_the_public_internet(host):
    assert allowed(host)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "64:ff9b::7f00:1"),
        *(
            "10.0.0.1",
            "172.16.3.4",
            "192.168.1.1",
            "100.64.0.1",
            "fd00::1",
            "fec0::1",
            "::ffff:10.0.0.1",
            "2002:7f00:1::1",
        ),
        *("192.0.2.1", "198.18.0.1", "240.0.0.1", "2001:db8::1"),
    ],
)
def test_loopback_and_private(host):
    """Loopback and private addresses are refused by default, and one setting allows them."""
    assert not allowed(host)
    assert not allowed(host, link_local=True)
    assert allowed(host, private=True)


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"],
)
def test_link_local(host):
    """Link-local addresses, where clouds serve credentials, need a separate setting."""
    assert not allowed(host)
    assert not allowed(host, private=True)
    assert allowed(host, private=True, link_local=True)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "ff02::1", "::ffff:0.0.0.0", "", "localhost", "1.2.3"]
)
def test_never(host):
    """Broadcast addresses, other addresses that do not belong to one host, and texts that are not addresses are never
    allowed."""
    assert not allowed(host, private=True, link_local=True)


@given(st.ip_addresses(v=4), st.booleans(), st.booleans())
def test_wrapping_changes_nothing(address, private, link_local):
    """An IPv4 address that is mapped into IPv6 is judged like the IPv4 address."""
    mapped = ipaddress.IPv6Address((0xFFFF << 32) | int(address))
    expected = allowed(str(address), private=private, link_local=link_local)
    assert allowed(str(mapped), private=private, link_local=link_local) == expected
