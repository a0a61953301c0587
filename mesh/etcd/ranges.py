"""Ranges of keys: half-open, in the order of the keys' bytes."""


def after_prefix(prefix: bytes) -> bytes:
    """Returns the end of the half-open range of all keys with a prefix. Returns b"\\0", which means no end, if no key
    can follow the range."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"
