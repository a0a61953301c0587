"""Ranges of keys, as etcd takes them: half-open, by the bytes of the keys."""


def after_prefix(prefix: bytes) -> bytes:
    """The end of the half-open range of all keys that begin with `prefix`; b"\\0" (no end) where there is none."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"
