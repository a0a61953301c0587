"""The C library's heap, which returns freed memory to the system on request.

Bodies of megabytes come and go, and glibc keeps everything below the last block in use: a worker that held 2.9 GB for a
moment kept 1.8 of them for good (measured). `trim` returns whole pages wherever they are.
"""

import ctypes


def trim() -> bool:
    """Returns unused memory to the system; false if the C library cannot. Takes milliseconds: call it in a thread."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):  # another C library
        return False
