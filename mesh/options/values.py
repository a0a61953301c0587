"""Sizes, spans of time and addresses: parsing of what people write, and formatting."""

import re

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Parses bytes from `67108864`, `64MiB`, `1.5Gi`, `200MB`. Raises ValueError with a text for the user."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write bytes or a number with a unit, such as 64MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """Formats a size for people, in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_span(text: str, unlimited: str) -> float | None:
    """Parses seconds from `600` or `0.5`. Returns None if the text is `unlimited`, the word for no limit. Raises
    ValueError with a text for the user."""
    if text.strip().lower() == unlimited:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < 1e9:
        raise ValueError(f"{text!r} is neither a number of seconds nor '{unlimited}'")
    return seconds


def parse_address(text: str) -> tuple[str, int]:
    """Parses host and port from `127.0.0.1:8033`, `[::1]:8033`, `:8033` (all interfaces) or `8033` (loopback). Raises
    ValueError with a text for the user."""
    host, colon, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, such as 127.0.0.1:8033")
    if not colon:
        host = "127.0.0.1"
    elif not host:
        host = "0.0.0.0"
    return host.strip("[]"), int(port)


def parse_urls(text: str) -> tuple[str, ...]:
    """Splits a list of URLs at commas; ignores spaces and empty entries."""
    return tuple(url.strip() for url in text.split(",") if url.strip())


def format_address(host: str, port: int) -> str:
    """Formats an address; the inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
