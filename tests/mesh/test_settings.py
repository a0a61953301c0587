"""Parsing and formatting of sizes and addresses in settings."""

import pytest

from mesh.options.etcdsettings import EtcdSettings
from mesh.options.values import format_address, format_bytes, parse_address, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("64MiB", 64 << 20), ("1.5Gi", 3 << 29), ("200MB", 200_000_000), ("8k", 8000), (" 2 GiB ", 2 << 30)],
)
def test_sizes(text, count):
    """Sizes are parsed in binary and decimal units, with and without the letter B."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.2M", "12 parsecs", "1ib"])
def test_what_is_no_size_is_refused(text):
    """An invalid size is refused with an error that shows how to write one."""
    with pytest.raises(ValueError, match="write bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:80", ("::1", 80)),
        (":80", ("0.0.0.0", 80)),
        ("80", ("127.0.0.1", 80)),
    ],
)
def test_addresses(text, address):
    """A port alone means loopback, so that nothing is exposed to the network by accident."""
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "host:99999", "host:x"])
def test_what_is_no_address_is_refused(text):
    """An invalid address is refused with an example of a valid one."""
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_sizes_for_people():
    """Sizes are formatted in bytes or in binary units."""
    sizes = [format_bytes(count) for count in (0, 1023, 1536, 200 << 20, 3 << 40)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "200 MiB", "3.0 TiB"]


def test_addresses_for_people():
    """Addresses are formatted with brackets around IPv6."""
    assert format_address("::1", 5) == "[::1]:5"


def test_secrets_stay_out_of_logs():
    """The `repr` of settings shows no password."""
    assert "hunter2" not in repr(EtcdSettings(user="u", password="hunter2"))
