"""The heap of a model server, which must not grow from call to call."""

import os
import subprocess
import sys

import pytest

from mesh.host import heap

GROWTH = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
SIZE, BOUNDARY = 4_000_000, 64
libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: glibc raises it by itself once such a block was freed
libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: the break then shows how much the heap needed
begin = libc.sbrk(0)
libc.sbrk.restype = ctypes.c_void_p
begin = libc.sbrk(0)
for _ in range(40):
    libc.malloc(24)  # what a call leaves behind
    output = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(output), BOUNDARY, SIZE) == 0
    libc.free(output)
print((libc.sbrk(0) - begin) // SIZE)
"""


def growth(environment: dict[str, str]) -> int:
    """Returns by how many blocks of 4 MB the heap of a process grows while the process allocates and frees such a block
    40 times."""
    done = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc only")
def test_the_heap_of_a_model_server_does_not_grow_with_each_output():
    """With glibc's default settings, the small blocks that calls leave behind keep a freed output from being used
    again."""
    assert growth(heap.joining(os.environ)) <= 2


def test_tunables_of_the_user_are_kept_and_prevail():
    assert heap.joining({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": heap._JOINING}
    given = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}
    assert heap.joining(given) == {"GLIBC_TUNABLES": f"{heap._JOINING}:glibc.malloc.tcache_count=7"}
    assert given == {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}
