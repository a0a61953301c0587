"""Numbers in plain words, for the sentences that explain a decision."""

_SIZES = ("B", "KiB", "MiB", "GiB")


def size(count: float) -> str:
    """Formats a number of bytes: `1.5 MiB`."""
    for unit in _SIZES:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def span(ms: float) -> str:
    """Formats a number of milliseconds: `12 s`, `3.5 min`, `2.0 h`."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 120_000:
        return f"{ms / 1000:.0f} s"
    if ms < 7_200_000:
        return f"{ms / 60_000:.1f} min"
    return f"{ms / 3_600_000:.1f} h"


def copies(count: int) -> str:
    """Formats a number of copies: `1 copy`, `2 copies`."""
    return "1 copy" if count == 1 else f"{count} copies"
