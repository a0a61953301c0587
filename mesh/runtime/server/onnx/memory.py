"""What this process's memory holds, to the byte; its upper bound; and giving back what was freed.

Sizes of models rest on glibc's `mallinfo2`: bytes in use in all of malloc's arenas (`uordblks`) and mapped apart for
large blocks (`hblkhd`). It costs 0.4 us to read and gives 75 KB for a small regression, load after load, where resident
memory says 0 for the first few. Python's own objects are not in it: they come from pymalloc, which does not use malloc.
Where the C library is not glibc, resident memory stands in, with all its coarseness.

glibc keeps what is freed: deleting 60 sessions gave back almost nothing of 1.2 GB, `malloc_trim(0)` nearly all. It
takes locks that allocations wait for (60 ms for that much), so it is called in a thread, and once for many unloads.

The bound is RLIMIT_DATA, so that an allocation beyond it fails in whoever asks, and the process goes on: a model of 101
bytes that asks for gigabytes gets an error, and the machine keeps its memory.
"""

import ctypes
import os
import resource

_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    )  # fmt: skip


_libc = ctypes.CDLL(None)
_mallinfo2 = getattr(_libc, "mallinfo2", None)  # glibc 2.33
if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo2
_malloc_trim = getattr(_libc, "malloc_trim", None)

EXACT = _mallinfo2 is not None
"""Whether `in_use` counts bytes, or reads resident memory for want of anything better."""


def in_use() -> int:
    """Bytes that this process has allocated and not freed."""
    if _mallinfo2 is None:
        return resident()
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    """Bytes of this process that are in physical memory."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE


def private() -> int:
    """Bytes of this process that are in physical memory and not of a file."""
    with open("/proc/self/statm", "rb") as statm:
        _, total, shared, *_ = statm.read().split()
    return (int(total) - int(shared)) * _PAGE


def trim() -> None:
    """Gives freed memory back to the system. Slow: to be called in a thread. Does nothing where it cannot."""
    if _malloc_trim is not None:
        _malloc_trim(0)


TLS_CONNECTION = 256 << 10
"""Bytes that uvloop reserves for a connection by TLS and hardly touches: with 200 of them, the process's private memory
was 57 MB larger and its resident memory 7."""


def widen(data: int) -> None:
    """Another RLIMIT_DATA in place of the one that `limit` gave, as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data if hard == resource.RLIM_INFINITY else min(data, hard), hard))


def limit(maximum: int) -> int:
    """Bounds this process's private memory to `maximum` resident bytes, and gives the RLIMIT_DATA that does it.

    RLIMIT_DATA counts what is writable and private whether it was ever touched or not, such as the 8 MiB stacks of
    threads. What stands reserved and untouched at this moment is added, so that the bound is about memory really used:
    call it once everything is set up. Raises ValueError where the process holds more than that already.
    """
    fields = {}
    with open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in ("VmData", "RssAnon"):
                fields[name] = int(value.split()[0]) * 1024
    held = fields.get("RssAnon", 0)
    if held >= maximum:
        raise ValueError(f"a memory limit of {maximum} bytes is below the {held} that the server needs for itself")
    data = maximum + max(0, fields.get("VmData", 0) - held)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        data = min(data, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (data, hard))
    return data
